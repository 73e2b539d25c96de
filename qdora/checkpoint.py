"""Adapters on disk, in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`.

`PeftModel.from_pretrained` reads what is written here, and what PEFT wrote is read here. The file holds the full
magnitude m = ‖W‖ + δ in fp32, under the key that PEFT and transformers both read. PEFT itself writes it without the
`.weight` at its end, and of that transformers' own loaders (`AutoModelForCausalLM.from_pretrained(adapter)`,
`model.load_adapter`) make nothing: the magnitudes stay what they began as. Under both keys they would report
the other as unexpected at every load. In the file's metadata stand the facts that PEFT's config has no place for:
whether the base was NF4, for `qdora merge` to know, and what tells the weights it was trained on from others, which
every verb that takes base and adapter compares (see `kinship`).

m in fp32 does not always give δ back to the last bit: next to a norm of 1, fp32 is spaced 6e-8. A trainer that goes on
from a checkpoint must not notice, so checkpoints carry δ itself as well, in `OFFSETS_FILE`, as does what a model's own
`save_pretrained` writes, which a trainer of somebody else's may call for one; the adapter of a finished run does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qdora.adapterfile import (
    CONFIG_FILE,
    OFFSETS_FILE,
    PREFIX,
    WEIGHTS_FILE,
    AdapterFile,
    LinearAdapter,
    peft_config,
    read_adapter,
    read_offsets,
)
from qdora.config import ALL_LINEAR, AdapterConfig, short_name
from qdora.distributed import local, say_once, spread_like, whole
from qdora.dora import DoRALinear
from qdora.errors import CheckpointError, ConfigError, shown
from qdora.inject import adapted_linears, attach, is_head, linear_paths, linear_shape
from qdora.kinship import Ancestry, answers_of, kinship, probed_paths
from qdora.nf4 import NF4Weight
from qdora.nf4format import BLOCKSIZE
from qdora.output import save_tensors, whole_files, write_json
from qdora.stream import StreamedWeight
from qdora.whole import names_for_peft, trained_whole

__all__ = ["load_adapter", "save_adapter"]

# In these (its `_MODEL_TO_CONVERSION_PATTERN` under transformers 5) PEFT takes the names of an MLP's linears, wherever
# they are, for what transformers 4 called the routed experts': it refuses DoRA on them and applies LoRA elsewhere.
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_TAKEN_IN = frozenset(
    {
        *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
        *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash"),
        *("mellum", "olmoe", "qwen3_moe", "qwen3_next", "solar_open"),
    }
)


def save_adapter(model: nn.Module, out: str | Path, exact_offsets: bool = False, write: bool = True) -> None:
    """Write the model's adapters to the directory `out`, which is made if need be.

    Args:
        model: with adapters attached. If it is sharded, every process must join in; the base is never gathered.
        exact_offsets: also write the magnitude offsets bit for bit, for a trainer to go on from.
        write: False leaves the writing to another process.

    Raises:
        ConfigError: the model has no adapters.
    """
    layers = adapted_linears(model)
    if not layers:
        raise ConfigError("the model has no adapters to save; attach some with load_model(path, adapter=...)")
    config: AdapterConfig = model.qdora_adapter  # type: ignore[assignment]
    tensors, offsets = {}, {}
    for path, layer in layers.items():
        A, B, offset = _gathered(layer)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B
        if offset is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector.weight"] = layer.base_norm().cpu() + offset
            offsets[path] = offset
    whole_weights = _whole_weights(model)
    tensors |= {f"{PREFIX}{name}": weight.detach().cpu().clone() for name, weight in whole_weights.items()}
    config = replace(config, modules_to_save=names_for_peft(model, config.modules_to_save))
    config = replace(config, ensure_weight_tying=len(set(map(id, whole_weights.values()))) < len(whole_weights))
    if not write:
        return
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "qdora_base": _kind_of_base(model), **_ancestry_of_base(model, layers)}
    _say_what_peft_mistakes(model, layers)
    linears = linear_paths(model)
    targets = _target_names(config, list(layers), linears, others=_others(model, linears))
    with whole_files(directory, last=CONFIG_FILE) as scratch:
        save_tensors(tensors, scratch / WEIGHTS_FILE, metadata)
        if exact_offsets and offsets:
            save_tensors(offsets, scratch / OFFSETS_FILE, {"format": "pt"})
        else:
            (directory / OFFSETS_FILE).unlink(missing_ok=True)  # an earlier adapter's
        write_json(scratch / CONFIG_FILE, peft_config(config, targets, getattr(model.config, "_name_or_path", None)))


def _say_what_peft_mistakes(model: nn.Module, adapted: Iterable[str]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    taken = (path for path in adapted if path.endswith(_TAKEN_FOR_EXPERTS) and ".experts." not in path)
    if kind in _TAKEN_IN and (path := next(taken, None)):
        say_once(
            f"PEFT takes the adapters of {path} for those of the routed experts in a {kind}: merge, or leave MLPs out "
            "by --lora_target_modules"
        )


def _whole_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained whole, by the names that the model gives them without adapters."""
    modules = trained_whole(model).items()
    return {f"{path}.{name}": weight for path, module in modules for name, weight in module.trained.named_parameters()}


@torch.no_grad()
def _gathered(layer: DoRALinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and the magnitude offset on the CPU, whole."""
    A, B, offset = (
        None if tensor is None else whole(tensor.detach()).cpu().contiguous()
        for tensor in (layer.lora_A, layer.lora_B, layer.magnitude_offset)
    )
    assert A is not None
    assert B is not None
    return A, B, offset


def load_adapter(model: nn.Module, path: str | Path, allow_other_base: bool = False) -> None:
    """Load an adapter directory, ours or PEFT's, into a model; attaches the adapters if there are none yet.

    Args:
        allow_other_base: also into a model with other weights than it was trained on, see `kinship`.

    Raises:
        CheckpointError: the directory is no adapter, is damaged, not finite, uses what DoRALinear has not, or is for
            another model.
    """
    adapter = read_adapter(path)
    _check_fits(adapter, model)
    if not adapted_linears(model):
        paths = list(adapter.linears)
        config = replace(
            adapter.config, target_modules=_target_names(adapter.config, paths, linear_paths(model), keep_all=True)
        )
        attach(model, config)
        model.qdora_adapter = config  # type: ignore[assignment]
    layers = adapted_linears(model)
    if layers.keys() != adapter.linears.keys():
        odd = sorted(layers.keys() ^ adapter.linears.keys())
        raise CheckpointError(f"{path} adapts other linears than the model does, first {odd[0]!r}; load a fresh model")
    found = kinship(
        adapter.ancestry,
        _known_ancestry(model),
        lambda name: _answers(layers[name]) if name in layers else None,
        adapter.own_hash,
    )
    found.settle(path, getattr(getattr(model, "config", None), "_name_or_path", None), allow_other_base)
    _copy_whole(_whole_weights(model), adapter.whole, path)
    offsets = read_offsets(Path(path))
    for name, layer in layers.items():
        _copy_into(layer, adapter.linears[name], offsets.get(name), name)


def _check_fits(adapter: AdapterFile, model: nn.Module) -> None:
    paths = set(linear_paths(model))
    for name, linear in adapter.linears.items():
        if name not in paths:
            if is_head(model, name):
                raise CheckpointError(
                    f"the adapter adapts the head ({name}), which can only be trained whole here (modules_to_save); "
                    "merge it by PEFT"
                )
            raise CheckpointError(
                f"the adapter is for another model: it adapts {shown(name)}, which is not a linear here"
                f"{f'; it was made for {adapter.base_model!r}' if adapter.base_model else ''}"
            )
        module: Any = model.get_submodule(name)
        if isinstance(module, DoRALinear) and linear.A.shape[0] != module.rank:
            raise CheckpointError(f"{name} has rank {module.rank} here and {linear.A.shape[0]} in the adapter")
        if isinstance(module, DoRALinear) and module.scaling != linear.scaling:
            raise CheckpointError(
                f"{name} is scaled by {module.scaling:g} here and by {linear.scaling:g} in the adapter; "
                "keep the rank, alpha and rsLoRA that the adapter was trained with"
            )
        out_features, in_features = linear_shape(module)
        linear.check_shape(name, out_features, in_features, adapter.base_model)


@torch.no_grad()
def _copy_whole(weights: Mapping[str, Tensor], values: Mapping[str, Tensor], path: str | Path) -> None:
    odd = sorted(weights.keys() ^ values.keys())
    if odd:
        raise CheckpointError(f"{path} trained other modules whole than the model does, first {odd[0]!r}")
    for name, weight in weights.items():
        if weight.shape != values[name].shape:
            raise CheckpointError(
                f"the adapter is for another model: {name} is {tuple(weight.shape)} here and "
                f"{tuple(values[name].shape)} in the adapter"
            )
        weight.copy_(values[name])


@torch.no_grad()
def _copy_into(layer: DoRALinear, adapter: LinearAdapter, offset: Tensor | None, name: str) -> None:
    if layer.use_dora != (adapter.magnitude is not None):
        raise CheckpointError(f"{name}: one of model and adapter has a magnitude and the other has none")
    _fill(layer.lora_A, adapter.A)
    _fill(layer.lora_B, adapter.B)
    if layer.magnitude_offset is not None and adapter.magnitude is not None:
        from_file = adapter.magnitude.to(layer.base.device) - layer.base_norm()
        # The file of exact offsets speaks only if it says what the adapter says; another tool may have changed that.
        rounding = float(adapter.magnitude.abs().max()) * 2**-20
        agrees = (
            offset is not None
            and offset.shape == from_file.shape
            and torch.allclose(offset.to(from_file), from_file, rtol=2**-7, atol=rounding)
        )
        _fill(layer.magnitude_offset, offset if agrees and offset is not None else from_file)
    layer.refresh()


def _fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter, or into this process's shard of it."""
    local(parameter).copy_(local(spread_like(values, parameter)))


def _kind_of_base(model: nn.Module) -> str:
    bases: list[Any] = [getattr(model.get_submodule(path), "base", None) for path in linear_paths(model)]
    bases = [base.weight if isinstance(base, StreamedWeight) else base for base in bases]
    packed = [isinstance(base, NF4Weight) for base in bases]
    if not any(packed):
        return "dense"
    return "nf4" if all(packed) and all(map(_is_usual, bases)) else "nf4-custom"


def _is_usual(weight: NF4Weight) -> bool:
    """Whether `quantize` makes the same NF4 weight of the same 16-bit model, unless told otherwise."""
    return (
        weight.nested_absmax is not None and weight.blocksize == BLOCKSIZE and weight.quantized_from == torch.bfloat16
    )


def _ancestry_of_base(model: nn.Module, layers: Mapping[str, DoRALinear]) -> dict[str, str]:
    """What `load_model` left on the model (nothing if it was made in another way), and answers to the probe."""
    probe = {path: _answers(layers[path]) for path in probed_paths(layers)}
    asked = {path: answers for path, answers in probe.items() if answers is not None}
    return replace(_known_ancestry(model), probe=asked).metadata()


def _known_ancestry(model: nn.Module) -> Ancestry:
    def known(name: str) -> str | None:
        value = getattr(model, f"qdora_base_{name}", None)
        return value if isinstance(value, str) else None

    return Ancestry(known("hash"), known("source"), getattr(model, "qdora_base_merged", ()))


def _answers(layer: DoRALinear) -> tuple[float, ...] | None:
    """The base weight's answers to the probe; None if this process holds only a part of it."""
    base: Any = layer.base
    return None if any(isinstance(p, DTensor) for p in base.parameters()) else answers_of(layer.base)


def _others(model: nn.Module, linears: Sequence[str]) -> list[str]:
    """The paths of all modules that are neither linears nor within one."""
    inner = tuple(f"{path}." for path in linears)
    known = set(linears)
    return [path for path, _ in model.named_modules() if path not in known and not path.startswith(inner)]


def _target_names(
    config: AdapterConfig,
    adapted: Iterable[str],
    linears: Iterable[str],
    keep_all: bool = False,
    others: Iterable[str] = (),
) -> str | tuple[str, ...]:
    """The shortest way to say which linears are adapted that says exactly that.

    Args:
        others: modules that are no linears, of which PEFT must not take one for meant.
    """
    adapted, others = set(adapted), list(others)

    def exact(candidate: AdapterConfig) -> bool:
        meant = [*linears, *([] if candidate.target_modules == ALL_LINEAR else others)]
        return {path for path in meant if candidate.targets(path)} == adapted

    last_names = tuple(sorted({short_name(path) for path in adapted}))
    # PEFT knows experts by the names of their linears.
    names_experts = any("." in name for name in last_names)
    if exact(config) and (keep_all or not (names_experts or config.target_modules == ALL_LINEAR)):
        return config.target_modules
    return last_names if exact(replace(config, target_modules=last_names)) else tuple(sorted(adapted))
