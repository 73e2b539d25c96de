"""Adapters on disk, in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`.

`PeftModel.from_pretrained` reads what is written here, and what PEFT wrote is read here. The file holds the full
magnitude m = ‖W‖ + δ in fp32, under PEFT's name for it, which has no `.weight` at its end. In the file's metadata stand
the facts that PEFT's config has no place for: whether the base was NF4, for `qdora merge` to know, and the fingerprint
of the files it was loaded from, for `qdora inspect` to compare.

m in fp32 does not always give δ back to the last bit: next to a norm of 1, fp32 is spaced 6e-8. A trainer that goes on
from a checkpoint must not notice, so checkpoints (not final adapters) carry δ itself as well, in `OFFSETS_FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qdora.config import ALL_LINEAR, AdapterConfig, short_name
from qdora.distributed import local, spread_like, whole
from qdora.dora import DoRALinear
from qdora.errors import CheckpointError, ConfigError, reason, shown
from qdora.inject import adapted_linears, attach, linear_paths, linear_shape
from qdora.kinship import Origin, answers_of, kinship, probed_paths
from qdora.nf4 import BLOCKSIZE, NF4Weight
from qdora.output import save_tensors, whole_files, write_json
from qdora.shards import check_header
from qdora.stream import StreamedWeight
from qdora.whole import is_named, names_for_peft, trained_whole

__all__ = ["AdapterFile", "LinearAdapter", "load_adapter", "loads_in_4bit", "read_adapter", "save_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
OFFSETS_FILE = "magnitude_offsets.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",  # PEFT before 0.10
}
# What changes the forward in ways DoRALinear has not.
_UNSUPPORTED = (
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "layer_replication",
)
# Initializations that leave the base weights as they are; others (PiSSA, OLoRA, CorDA, LoftQ, …) subtract the adapter
# from the base, and the adapter means nothing on the base itself.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LinearAdapter:
    """The trained tensors of one linear."""

    A: Tensor
    """(rank, in_features)."""
    B: Tensor
    """(out_features, rank)."""
    magnitude: Tensor | None
    """(out_features,) fp32; None for LoRA."""
    scaling: float

    def check_shape(self, path: str, out_features: int, in_features: int, base: str | None) -> None:
        """
        Raises:
            CheckpointError: the adapter is for a linear of another shape.
        """
        shape = (self.B.shape[0], self.A.shape[1])
        if shape != (out_features, in_features):
            raise CheckpointError(
                f"the adapter is for another model: {path} is {out_features}×{in_features} here and "
                f"{shape[0]}×{shape[1]} in the adapter{f', which was made for {base!r}' if base else ''}"
            )


@dataclass(frozen=True)
class AdapterFile:
    """An adapter directory, read and checked."""

    config: AdapterConfig
    linears: dict[str, LinearAdapter]
    """By the path of the linear in the model."""
    base_model: str | None
    """What the adapter says it was trained on."""
    base_kind: str | None
    """What that base was: `dense`; `nf4`, as `quantize` makes it unless told otherwise; or `nf4-custom`. None if the
    file does not say (PEFT's do not)."""
    origin: Origin = field(default_factory=Origin)
    """Which weights the base was, as far as the file says. A 16-bit model that was quantized as it loaded has the hash
    of the 16-bit files."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """The weights of modules that were trained whole, by their names in the model."""

    @property
    def base_hash(self) -> str | None:
        """`shards.fingerprint` of the files that the base was loaded from; None if the file does not say."""
        return self.origin.hash

    def rounds(self, model: str | Path, otherwise: str) -> bool:
        """Whether a 16-bit model must be rounded to NF4 to be what the adapter was trained on.

        Args:
            otherwise: what else can be done if that is not possible, to end the error's sentence.

        Raises:
            CheckpointError: it was trained on NF4 weights that cannot be made anew from that model.
        """
        if self.base_kind == "nf4-custom":
            raise CheckpointError(
                f"the adapter was trained on NF4 weights that were not quantized in the usual way, and {model} is "
                f"16-bit; name the NF4 checkpoint it was trained on ({self.base_model}), or {otherwise}"
            )
        return self.base_kind == "nf4"


def loads_in_4bit(asked: bool | None, is_nf4: bool, file: AdapterFile | None, model: str | Path) -> bool:
    """Whether a model is quantized as it loads: as asked, or by default only if its adapter was trained on NF4.

    Args:
        asked: `--load_in_4bit`; None if nothing was said.
        is_nf4: whether the model is in NF4 already.

    Raises:
        CheckpointError: see `AdapterFile.rounds`.
    """
    if asked is not None:
        return asked
    return not is_nf4 and file is not None and file.rounds(model, "choose by --load_in_4bit")


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
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = B
        if offset is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = layer.base_norm().cpu() + offset
            offsets[path] = offset
    whole_weights = _whole_weights(model)
    tensors |= {f"{_PREFIX}{name}": weight.detach().cpu().clone() for name, weight in whole_weights.items()}
    config = replace(config, modules_to_save=names_for_peft(model, config.modules_to_save))
    config = replace(config, ensure_weight_tying=len(set(map(id, whole_weights.values()))) < len(whole_weights))
    if not write:
        return
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "qdora_base": _kind_of_base(model), **_origin_of_base(model, layers)}
    targets = _target_names(config, list(layers), linear_paths(model))
    (directory / OFFSETS_FILE).unlink(missing_ok=True)  # an earlier adapter's
    with whole_files(directory) as scratch:
        save_tensors(tensors, scratch / WEIGHTS_FILE, metadata)
        if exact_offsets and offsets:
            save_tensors(offsets, scratch / OFFSETS_FILE, {"format": "pt"})
        write_json(scratch / CONFIG_FILE, _peft_config(config, targets, getattr(model.config, "_name_or_path", None)))


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
        adapter.origin, _known_origin(model), lambda name: _answers(layers[name]) if name in layers else None
    )
    found.settle(path, getattr(getattr(model, "config", None), "_name_or_path", None), allow_other_base)
    _copy_whole(_whole_weights(model), adapter.whole, path)
    offsets = _read_offsets(Path(path))
    for name, layer in layers.items():
        _copy_into(layer, adapter.linears[name], offsets.get(name), name)


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter directory and check everything that can be checked without the model.

    Raises:
        CheckpointError: see `load_adapter`.
    """
    directory = Path(path)
    if not (directory / CONFIG_FILE).is_file():
        found = "a model directory" if (directory / "config.json").is_file() else "no such file"
        raise CheckpointError(f"{directory} is not an adapter: expected {CONFIG_FILE}, found {found}")
    raw = _read_json(directory / CONFIG_FILE)
    _check_weights_file(directory)
    config = _config_from_peft(raw, directory)
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            metadata = file.metadata() or {}
        check_header(directory / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} is missing or damaged: {reason(error)}") from None
    whole = _taken_whole(tensors, config, directory)
    linears = {
        name: _linear_adapter(name, parts, config, directory) for name, parts in _grouped(tensors, directory).items()
    }
    in_bf16 = all(linear.A.dtype == torch.bfloat16 for linear in linears.values())
    config = replace(config, dtype="bfloat16" if in_bf16 else "float32")
    origin = Origin.from_metadata(metadata)
    return AdapterFile(config, linears, raw.get("base_model_name_or_path"), metadata.get("qdora_base"), origin, whole)


def _check_weights_file(directory: Path) -> None:
    if (directory / WEIGHTS_FILE).is_file():
        return
    if (directory / _PICKLED_FILE).is_file():
        raise CheckpointError(
            f"{directory} holds its adapter as {_PICKLED_FILE}, a pickle, which runs code when opened; convert it to "
            "safetensors first"
        )
    raise CheckpointError(f"{directory} holds no {WEIGHTS_FILE}; download or write it again")


def _taken_whole(tensors: dict[str, Tensor], config: AdapterConfig, directory: Path) -> dict[str, Tensor]:
    """Take the weights of modules that were trained whole out of the adapter's tensors."""
    names, whole = config.modules_to_save, {}
    for key in [key for key in tensors if names and not key.endswith(tuple(_PARTS))]:
        name = key.removeprefix(_PREFIX)
        # Of a pair that stays tied PEFT's config names one, and its file holds both.
        if config.ensure_weight_tying or is_named(name.rpartition(".")[0], names):
            whole[name] = tensors.pop(key)
            if not torch.isfinite(whole[name]).all():
                raise CheckpointError(f"{directory} holds values that are not finite in {name!r}")
    absent = [name for name in names if not any(is_named(key.rpartition(".")[0], [name]) for key in whole)]
    if absent:
        raise CheckpointError(f"{directory} names {absent[0]!r} in modules_to_save, and holds no weight of it")
    return whole


def _grouped(tensors: dict[str, Tensor], directory: Path) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
        if suffix is None:
            raise CheckpointError(f"{directory} holds {key!r}, which is no part of a LoRA or DoRA linear")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{directory} holds values that are not finite in {key!r}; its training went wrong")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{directory} holds whole numbers ({tensor.dtype}) in {key!r}; it is no adapter")
        grouped.setdefault(key.removeprefix(_PREFIX).removesuffix(suffix), {})[_PARTS[suffix]] = tensor
    if not grouped:
        raise CheckpointError(f"{directory} holds no adapter tensors")
    return grouped


def _linear_adapter(name: str, parts: dict[str, Tensor], config: AdapterConfig, directory: Path) -> LinearAdapter:
    expected = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    if parts.keys() != expected:
        raise CheckpointError(
            f"{directory}: {name} has the parts {', '.join(sorted(parts))}; with use_dora={config.use_dora} "
            f"it needs {', '.join(sorted(expected))}"
        )
    A, B, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    rank = config.rank_of(name)
    sizes_agree = A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1] == rank
    if not sizes_agree or (magnitude is not None and magnitude.shape != B.shape[:1]):
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise CheckpointError(f"{directory}: the shapes of {name} do not agree with rank {rank}: {shapes}")
    return LinearAdapter(A, B, None if magnitude is None else magnitude.float(), config.scaling_of(name))


def _check_fits(adapter: AdapterFile, model: nn.Module) -> None:
    paths = set(linear_paths(model))
    for name, linear in adapter.linears.items():
        if name not in paths:
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
        agrees = offset is not None and torch.allclose(offset.to(from_file), from_file, rtol=2**-7, atol=rounding)
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
    usual = all(packed) and all(base.nested_absmax is not None and base.blocksize == BLOCKSIZE for base in bases)
    return "nf4" if usual and getattr(model.config, "dtype", None) == torch.bfloat16 else "nf4-custom"


def _origin_of_base(model: nn.Module, layers: Mapping[str, DoRALinear]) -> dict[str, str]:
    """What `load_model` left on the model (nothing if it was made in another way), and answers to the probe."""
    probe = {path: _answers(layers[path]) for path in probed_paths(layers)}
    asked = {path: answers for path, answers in probe.items() if answers is not None}
    return replace(_known_origin(model), probe=asked).metadata()


def _known_origin(model: nn.Module) -> Origin:
    own, source = (getattr(model, name, None) for name in ("qdora_base_hash", "qdora_base_source"))
    return Origin(own if isinstance(own, str) else None, source if isinstance(source, str) else None)


def _answers(layer: DoRALinear) -> tuple[float, ...] | None:
    """To the probe; None if this process holds a part of the weight only."""
    base: Any = layer.base
    return None if any(isinstance(p, DTensor) for p in base.parameters()) else answers_of(layer.base)


def _read_offsets(directory: Path) -> dict[str, Tensor]:
    path = directory / OFFSETS_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {reason(error)}") from None


def _target_names(
    config: AdapterConfig, adapted: Iterable[str], linears: Iterable[str], keep_all: bool = False
) -> str | tuple[str, ...]:
    """The shortest way to say which linears are adapted that says exactly that."""
    adapted = set(adapted)

    def exact(candidate: AdapterConfig) -> bool:
        return {path for path in linears if candidate.targets(path)} == adapted

    last_names = tuple(sorted({short_name(path) for path in adapted}))
    # PEFT knows experts by the names of their linears.
    names_experts = any("." in name for name in last_names)
    if exact(config) and (keep_all or not (names_experts or config.target_modules == ALL_LINEAR)):
        return config.target_modules
    return last_names if exact(replace(config, target_modules=last_names)) else tuple(sorted(adapted))


def _peft_config(config: AdapterConfig, targets: str | tuple[str, ...], base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": list(config.modules_to_save) or None,
        "ensure_weight_tying": config.ensure_weight_tying,
    }


def _config_from_peft(raw: dict[str, Any], directory: Path) -> AdapterConfig:
    if raw.get("peft_type") != "LORA":
        found = raw.get("peft_type")
        raise CheckpointError(f"{directory} is a {shown(found)} adapter; only LORA (with or without DoRA) fits")
    unsupported = [name for name in _UNSUPPORTED if raw.get(name)]
    if not any(raw.get("init_lora_weights") is init or raw.get("init_lora_weights") == init for init in _PLAIN_INITS):
        unsupported.append(f"init_lora_weights={shown(raw['init_lora_weights'])}")
    if raw.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise CheckpointError(f"{directory} uses {', '.join(unsupported)}, which qdora does not load")
    targets = raw.get("target_modules") or ALL_LINEAR
    try:
        return AdapterConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            use_dora=bool(raw.get("use_dora", False)),
            use_rslora=bool(raw.get("use_rslora", False)),
            target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            modules_to_save=tuple(sorted(set(raw.get("modules_to_save") or ()))),
            ensure_weight_tying=bool(raw.get("ensure_weight_tying", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE} is not a LoRA config: {reason(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
