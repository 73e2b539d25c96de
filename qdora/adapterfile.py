"""An adapter directory, read and checked without its model: PEFT's config, our facts in the file's metadata.

What PEFT wrote is read here. What its config asks for and our layer has not is refused rather than left out. And each
of these files may come from a stranger: nothing in them is believed before it was looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qdora.config import ALL_LINEAR, OTHER_FORWARDS, AdapterConfig, ends_in
from qdora.distributed import say_once
from qdora.errors import CheckpointError, ConfigError, reason, shown
from qdora.kinship import Ancestry
from qdora.shards import header_of

__all__ = [
    "CONFIG_FILE",
    "OFFSETS_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "AdapterFile",
    "LinearAdapter",
    "peft_config",
    "read_adapter",
    "read_offsets",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
OFFSETS_FILE = "magnitude_offsets.safetensors"
PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    # As PEFT writes it, and as transformers looks for it and we write it; a file may hold both.
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# What is trained in other places than linears, or other layers.
_UNSUPPORTED = ("target_parameters", "trainable_token_indices", *OTHER_FORWARDS, "layer_replication")
# What else PEFT 0.21 may say of a LoRA adapter: how it was begun, trained and is to be found. No forward depends on it.
_HARMLESS = frozenset(
    {
        *("auto_mapping", "peft_version", "revision", "runtime_config", "megatron_config", "megatron_core"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "qalora_group_size"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    }
)
_KINDS: dict[str, tuple[Any, str]] = {
    "use_dora": (bool, "true or false"),
    "use_rslora": (bool, "true or false"),
    "base_model_name_or_path": (str, "a text"),
    "modules_to_save": ((str, list), "a list of names"),
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
    ancestry: Ancestry = field(default_factory=Ancestry)
    """Which weights the base was, as far as the file says. A 16-bit model that was quantized as it loaded has the hash
    of the 16-bit files."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """The weights of modules that were trained whole, by their names in the model."""
    directory: Path = Path()

    def own_hash(self) -> str:
        """SHA-256 of the file of weights, in hexadecimal."""
        with (self.directory / WEIGHTS_FILE).open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    @property
    def base_hash(self) -> str | None:
        """`shards.fingerprint` of the files that the base was loaded from; None if the file does not say."""
        return self.ancestry.hash

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
        header_of(directory / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} is missing or damaged: {reason(error)}") from None
    whole = _taken_whole(tensors, config, directory)
    config = replace(config, modules_to_save=_names_of(whole, config.modules_to_save))
    linears = {
        name: _linear_adapter(name, parts, config, directory) for name, parts in _grouped(tensors, directory).items()
    }
    in_bf16 = all(linear.A.dtype == torch.bfloat16 for linear in linears.values())
    config = replace(config, dtype="bfloat16" if in_bf16 else "float32")
    ancestry = Ancestry.from_metadata(metadata)
    base = raw.get("base_model_name_or_path")
    return AdapterFile(config, linears, base, metadata.get("qdora_base"), ancestry, whole, directory)


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
        name = key.removeprefix(PREFIX)
        # Of a pair that stays tied PEFT's config names one, and its file holds both.
        if config.ensure_weight_tying or name.rpartition(".")[0].endswith(names):
            whole[name] = tensors.pop(key)
            _check_values(whole[name], key, directory)
    absent = [name for name in names if not any(key.rpartition(".")[0].endswith(name) for key in whole)]
    if absent:
        raise CheckpointError(f"{directory} names {absent[0]!r} in modules_to_save, and holds no weight of it")
    return whole


def _names_of(whole: Iterable[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the modules of these weights; paths, if a name was meant as PEFT means it.

    To PEFT `norm` is the end of `input_layernorm`, to us it is a whole part of a path.
    """
    paths = tuple(dict.fromkeys(key.rpartition(".")[0] for key in whole))
    meant = [path for path in paths if path.endswith(names)]
    return names if all(any(ends_in(path, name) for name in names) for path in meant) else paths


def _grouped(tensors: dict[str, Tensor], directory: Path) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
        if suffix is None:
            raise CheckpointError(
                f"{directory} holds {shown(key)}, which is no part of a LoRA or DoRA linear{_why_not(key)}"
            )
        _check_values(tensor, key, directory)
        parts = grouped.setdefault(key.removeprefix(PREFIX).removesuffix(suffix), {})
        known = parts.setdefault(_PARTS[suffix], tensor)
        if known is not tensor and not torch.equal(known.float(), tensor.float()):
            raise CheckpointError(f"{directory} holds two magnitudes that differ, one in {key!r}; keep the right one")
    if not grouped:
        raise CheckpointError(f"{directory} holds no adapter tensors")
    return grouped


def _check_values(tensor: Tensor, key: str, directory: Path) -> None:
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{directory} holds {tensor.dtype} in {key!r}; an adapter is in float32 or 16 bits")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{directory} holds values that are not finite in {key!r}; its training went wrong")


def _why_not(key: str) -> str:
    """What PEFT puts under such a key, and what can be done."""
    if ".lora_embedding_" in key or ".base_layer." in key:
        return ": it adapts embedding or head, which can only be trained whole here (modules_to_save); merge it by PEFT"
    if key.endswith(".weight") and ".lora_" not in key:
        return ": PEFT saves an embedding that was given more tokens so; merge it by PEFT"
    return ""


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


def read_offsets(directory: Path) -> dict[str, Tensor]:
    """The exact magnitude offsets of a checkpoint, by the path of the linear; none if the adapter has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / OFFSETS_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {reason(error)}") from None


def peft_config(config: AdapterConfig, targets: str | tuple[str, ...], base: str | None) -> dict[str, Any]:
    """The config as PEFT writes it.

    Args:
        targets: which linears are adapted, as it is to be said.
        base: where the base model was loaded from.
    """
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
    _check_kinds(raw, directory / CONFIG_FILE)
    known = {*peft_config(AdapterConfig(), ALL_LINEAR, None), *_UNSUPPORTED, *_HARMLESS}
    if odd := ", ".join(sorted(name for name, value in raw.items() if value and name not in known)):
        say_once(f"{directory} was written by a newer PEFT: {shown(odd)}, which is not known here, is left out")
    targets, whole = raw.get("target_modules") or ALL_LINEAR, raw.get("modules_to_save") or ()
    whole = (whole,) if isinstance(whole, str) else whole  # to PEFT a text is one name
    try:
        return AdapterConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            use_dora=bool(raw.get("use_dora")),
            use_rslora=bool(raw.get("use_rslora")),
            target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            modules_to_save=tuple(sorted(set(whole))),
            ensure_weight_tying=not whole or bool(raw.get("ensure_weight_tying", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE} is not a LoRA config: {reason(error)}") from None


def _check_kinds(raw: dict[str, Any], path: Path) -> None:
    """What a kind of value has to be where every other would be taken for something that it does not say."""
    for name, (kind, wanted) in _KINDS.items():
        value = raw.get(name)
        entries = value if isinstance(value, list) else ()
        if not (value is None or isinstance(value, kind)) or not all(isinstance(entry, str) for entry in entries):
            raise CheckpointError(f"{path} is not a LoRA config: {name} is {shown(value)}; it must be {wanted}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
