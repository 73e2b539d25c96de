"""Swapping a model's linears for ours, and finding them again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from qdora.base import BaseWeight
from qdora.bypassed import bypassed_paths, shared_paths
from qdora.config import ALL_LINEAR, AdapterConfig, is_named
from qdora.dense import DenseWeight
from qdora.dora import DoRALinear, FrozenLinear
from qdora.errors import CheckpointError, ConfigError
from qdora.experts import router_paths
from qdora.gated import replace_mlps
from qdora.nearest import did_you_mean
from qdora.nf4 import NF4Weight, is_packed_linear
from qdora.norm import replace_norms
from qdora.whole import train_whole, trained_whole

__all__ = [
    "adapt",
    "adapted_linears",
    "adapters_disabled",
    "attach",
    "decoder_layers",
    "freeze_dense",
    "freeze_packed",
    "hold_outputs",
    "is_head",
    "left_alone",
    "linear_paths",
    "linear_shape",
    "make_lean",
    "make_plain",
    "prepare_targets",
]

# x @ weight.T + bias, written out.
_LINEAR_TOO = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the linears that may carry an adapter: every one but the output head and those that are `left_alone`."""
    head, others = _head_of(model), {*left_alone(model)}
    whole = tuple(f"{path}." for path in trained_whole(model))
    return [
        path
        for path, module in model.named_modules()
        if _is_linear(module) and module is not head and path not in others and not path.startswith(whole)
    ]


def left_alone(model: nn.Module) -> list[str]:
    """Paths of linears that stay as they are: they choose among experts, the model reads their weight itself, or they
    share it."""
    return [*router_paths(model), *bypassed_paths(model), *shared_paths(model)]


def is_head(model: nn.Module, path: str) -> bool:
    """Whether the output head is at this path."""
    head = _head_of(model)
    return head is not None and dict(model.named_modules()).get(path) is head


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of one of them; GPT-2's `Conv1D` stores its weight the other way round."""
    if isinstance(linear, Conv1D):
        in_features, out_features = linear.weight.shape
        return out_features, in_features
    module: Any = linear
    return module.out_features, module.in_features


def make_plain(model: nn.Module) -> None:
    """Put an `nn.Linear` in the place of each linear of another class that computes the same, with its parameters.

    transformers packs no others: of a Falcon, asked for in 4 bits, it leaves all linears in 16, and says so to the log.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear and _computes_as_linear(module):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(path, plain)


def make_lean(model: nn.Module) -> None:
    """Put norms and MLPs of ours, which keep less for the backward, in the place of those that compute the same."""
    replace_norms(model)
    replace_mlps(model)


def adapted_linears(model: nn.Module) -> dict[str, DoRALinear]:
    """Every adapted linear of the model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, DoRALinear)}


def freeze_packed(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each of bitsandbytes' 4-bit linears by a `FrozenLinear` over the same memory, in place.

    One whose weight is read elsewhere becomes an ordinary linear of `dtype`, if somebody quantized it: the head, for
    losses and generation, and those that are bypassed (see `bypassed`).

    Raises:
        CheckpointError: a weight has another shape than its module; neither transformers nor bitsandbytes looks.
    """
    head, bypassed = _head_of(model), {*bypassed_paths(model)}
    for path, module in list(model.named_modules()):
        if is_packed_linear(module):
            base, bias = _base_of(module)
            expected, found = linear_shape(module), (base.out_features, base.in_features)
            if found != expected:
                raise CheckpointError(f"the weight of {path} is {found}, and {expected} by config.json")
            is_read = module is head or path in bypassed
            model.set_submodule(path, _dense_linear(base, bias, dtype) if is_read else FrozenLinear(base, bias))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers, from the first to the last: its longest list of layers that can be checkpointed.

    Raises:
        ConfigError: the model has none.
    """
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "gradient_checkpointing")
    ]
    if not stacks:
        raise ConfigError(f"{type(model).__name__} has no decoder layers that can be checkpointed or streamed")
    return max(stacks, key=len)


def freeze_dense(module: nn.Module) -> None:
    """Replace each plain linear within by a `FrozenLinear` over the same memory, in place."""
    for path, linear in list(module.named_modules()):
        if isinstance(linear, Conv1D) or (_computes_as_linear(linear) and not is_packed_linear(linear)):
            module.set_submodule(path, FrozenLinear(*_base_of(linear)))


def attach(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Freeze the model and give each targeted linear a fresh adapter, in place.

    Returns:
        The paths of the adapted linears.

    Raises:
        ConfigError: there are adapters already, no linear is targeted, or a module to save is none.
    """
    targets = prepare_targets(model, config)
    for path in targets:
        adapt(model, path, config)
    train_whole(model, config.modules_to_save, config.ensure_weight_tying)
    return targets


def prepare_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Freeze the model and list the linears that the config targets, in the model's order. Raises as `attach`."""
    if adapted_linears(model):
        raise ConfigError("the model already carries adapters; load it afresh to attach others")
    paths = linear_paths(model)
    meant = _in_the_decoder(model, paths) if config.target_modules == ALL_LINEAR else paths
    targets = [path for path in meant if config.targets(path)]
    if not targets:
        names = sorted({path.rpartition(".")[2] for path in paths})
        asked = config.target_modules if isinstance(config.target_modules, str) else config.target_modules[0]
        raise ConfigError(
            f"target_modules {config.target_modules!r} matches no linear (there are {', '.join(names)})"
            f"{did_you_mean(asked, names)}"
        )
    if not isinstance(config.target_modules, str):
        _check_each_is_found(config.target_modules, targets, paths)
    model.requires_grad_(False)
    return targets


def _in_the_decoder(model: Any, paths: list[str]) -> list[str]:
    """Of a model that sees or hears, those that text goes through, if the others stand apart: these would not train."""
    towers = [f"{kind}_config" for kind in ("vision", "audio", "speech")]
    has_towers = any(hasattr(getattr(model, "config", None), name) for name in towers)
    decoder = model.get_decoder() if has_towers and hasattr(model, "get_decoder") else None
    place = next((f"{path}." for path, module in model.named_modules() if module is decoder and path), "")
    return [path for path in paths if path.startswith(place)] or paths


def adapt(model: nn.Module, path: str, config: AdapterConfig) -> None:
    """Give one linear a fresh adapter, in place, on the device where the linear is."""
    base, bias = _base_of(model.get_submodule(path))
    layer = DoRALinear(
        base,
        config.rank_of(path),
        config.scaling_of(path),
        bias,
        config.use_dora,
        config.dropout,
        getattr(torch, config.dtype),
    )
    model.set_submodule(path, layer.train(model.training))


def hold_outputs(model: nn.Module, names: Collection[str]) -> None:
    """Let the linears at these paths within a decoder layer hold their outputs (see `holding`), and no others.

    Raises:
        ConfigError: the model has no decoder layers.
    """
    for layer in decoder_layers(model):
        for name, linear in layer.named_modules():
            if isinstance(linear, DoRALinear):
                linear.hold_output = name in names


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes as its base does, without its adapters."""
    layers: list[Any] = [*adapted_linears(model).values(), *trained_whole(model).values()]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _head_of(model: nn.Module) -> Any:
    get_head: Any = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


def _dense_linear(base: BaseWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(base.in_features, base.out_features, bias=bias is not None)
    linear.weight = nn.Parameter(base.dequantize(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def _is_linear(module: nn.Module) -> bool:
    ours_or_packed = isinstance(module, Conv1D | FrozenLinear | DoRALinear) or is_packed_linear(module)
    return ours_or_packed or _computes_as_linear(module)


def _computes_as_linear(module: nn.Module) -> bool:
    """`nn.Linear`, or one of its children that leaves the arithmetic as it is: some choose experts, or work in groups.

    `nn.MultiheadAttention` has one that is never called, for it takes the weight out of it.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind is NonDynamicallyQuantizableLinear:
        return False
    return kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__qualname__}" in _LINEAR_TOO


def _base_of(module: nn.Module) -> tuple[BaseWeight, Tensor | None]:
    if isinstance(module, FrozenLinear):
        return module.base, module.bias
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if is_packed_linear(module):
        return NF4Weight.from_packed_linear(module), bias
    return DenseWeight(weight.t() if isinstance(module, Conv1D) else weight), bias


def _check_each_is_found(names: tuple[str, ...], targets: list[str], paths: list[str]) -> None:
    for name in names:
        if not any(is_named(path, name) for path in targets):
            known = sorted({path.rpartition(".")[2] for path in paths})
            raise ConfigError(
                f"target module {name!r} matches no linear (there are {', '.join(known)}){did_you_mean(name, known)}"
            )
