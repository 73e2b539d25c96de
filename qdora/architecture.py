"""What a model's config alone tells: its architecture without weights, its linears, how it is quantized."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qdora.arithmetic import compute_dtype, in_sixteen_bits
from qdora.config import AdapterConfig
from qdora.dora import FrozenLinear
from qdora.errors import CheckpointError, ConfigError, NumericsError, reason, shown
from qdora.experts import expand_experts, stacks_left
from qdora.inject import attach, left_alone, linear_paths, linear_shape, make_lean
from qdora.loader import KeyNames, key_names
from qdora.nf4 import NF4Weight
from qdora.patterns import is_tame
from qdora.sources import check_model, quietly, unusable

__all__ = [
    "Linears",
    "context_of",
    "hollow_model",
    "is_nf4",
    "is_nf4_checkpoint",
    "load_config",
    "model_linears",
    "quantization_of",
]

_MOST_LAYERS = 1_000


def context_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model takes, if its config says so."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@dataclass(frozen=True)
class Linears:
    """Which weights of a checkpoint are linears, found from the config alone."""

    transposed: dict[str, bool]
    """Path of the linear in the model → whether its weight is stored (in, out), as GPT-2's `Conv1D` does."""
    skipped: tuple[str, ...]
    """The modules that stay 16-bit: the head, what chooses among experts and what the user named."""
    shapes: dict[str, tuple[int, int]]
    """Path of the linear → (out_features, in_features)."""
    names: KeyNames
    stacks: tuple[str, ...] = ()
    """Experts that are no linears and stay 16-bit, for their stacks are of a kind that is not known here."""
    ends: tuple[str, str] | None = None
    """The weights of input embedding and head by their names in the model."""
    precise: tuple[str, ...] = ()
    """Parts of the names of tensors that keep their dtype: what chooses among experts may differ in few bits."""
    read: frozenset[str] = frozenset()
    """The names of all tensors that the model reads."""

    def find(self, key: str) -> str | None:
        """The path of the linear whose weight is stored under this key; None if it is no linear's."""
        path = key.removesuffix(".weight")
        return None if path == key else self.named(path, self.transposed)

    def named(self, name: str, known: Container[str]) -> str | None:
        """What a checkpoint calls `name` as the model calls it, if it is among the known names."""
        return next((candidate for candidate in self.names.candidates(name) if candidate in known), None)

    def in_sixteen_bits(self, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the checkpoint as it is written; in its own dtype what the model computes with so.

        Raises:
            NumericsError: it is not finite, or would not be; unless the model does not read it (a causal mask of -inf).
        """
        if any(f".{part}." in f".{key}." for part in self.precise):
            dtype = tensor.dtype
        try:
            return in_sixteen_bits(key, tensor, dtype)
        except NumericsError:
            # An expert's key is none of the model's, whose experts are stacked.
            if key.endswith(".weight") or self.named(key, self.read) is not None:
                raise
            return tensor

    def quantizes(self, path: str) -> bool:
        """Whether this linear becomes NF4."""
        return _becomes_nf4(path, list(self.skipped))


def model_linears(directory: Path, skip_modules: tuple[str, ...] = (), trust_remote_code: bool = False) -> Linears:
    """Build the architecture without weights and list its linears.

    Raises:
        CheckpointError: the directory is no causal language model.
        ConfigError: a module to skip matches nothing.
    """
    model = _without_weights(load_config(directory, trust_remote_code), directory, torch.float32, trust_remote_code)
    for name in skip_modules:
        _check_skip(name, model)
    head = model.get_output_embeddings()
    heads = tuple(path for path, module in model.named_modules() if module is head and head is not None)
    linears = {path: model.get_submodule(path) for path in linear_paths(model)}
    transposed = {path: isinstance(linear, Conv1D) for path, linear in linears.items()}
    shapes = {path: linear_shape(linear) for path, linear in linears.items()}
    stays = (*heads, *left_alone(model), *skip_modules)
    embeddings = [path for path, module in model.named_modules() if module is model.get_input_embeddings()]
    ends = (f"{embeddings[0]}.weight", f"{heads[0]}.weight") if embeddings and heads else None
    return Linears(
        transposed=transposed,
        skipped=stays,
        shapes=shapes,
        names=key_names(model),
        stacks=tuple(stacks_left(model)),
        ends=ends,
        precise=tuple(sorted(model._keep_in_fp32_modules_strict or ())),
        read=frozenset(model.state_dict()),
    )


def hollow_model(
    path: str | Path,
    adapter: AdapterConfig,
    *,
    dtype: str = "bfloat16",
    load_in_4bit: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """What `load_model` would return, without values (on the meta device), from the config alone.

    Args:
        path: a directory with `config.json`, the file itself, or a Hub id, of which only the config is fetched.

    Raises:
        CheckpointError: no causal language model.
    """
    config = load_config(path, trust_remote_code)
    packed = is_nf4(config, path)
    how = quantization_of(config) if packed else {}
    model = _without_weights(config, path, compute_dtype(dtype), trust_remote_code)
    if packed or load_in_4bit:
        skipped = list(how.get("llm_int8_skip_modules") or ())
        with torch.device("meta"):
            for name in linear_paths(model):
                if _becomes_nf4(name, skipped):
                    _make_hollow(model, name, bool(how.get("bnb_4bit_use_double_quant", True)))
    make_lean(model)
    with torch.device("meta"):
        attach(model, adapter)
    return model


def _becomes_nf4(path: str, skipped: list[str]) -> bool:
    # "experts" is the name of a module that is gone, and means what was in it
    before, experts, _ = path.partition(".experts.")
    places = [path, f"{before}.experts"] if experts else [path]
    return all(should_convert_module(place, skipped) for place in places)


def _make_hollow(model: nn.Module, path: str, double_quant: bool) -> None:
    linear = model.get_submodule(path)
    model.set_submodule(path, FrozenLinear(NF4Weight.hollow(*linear_shape(linear), double_quant), linear.bias))  # type: ignore[arg-type]


def _without_weights(
    config: PretrainedConfig, source: str | Path, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"), quietly():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            expand_experts(model)
            return model
    except Exception as error:
        # a config may be nonsense in more ways than there are kinds of errors
        raise CheckpointError(f"{source} is no causal language model: {reason(error)}") from None


def _check_skip(name: str, model: PreTrainedModel) -> None:
    try:
        re.compile(name)
    except re.error as error:
        raise ConfigError(f"skip_modules: {name!r} is neither a name nor a regular expression ({error})") from None
    if not is_tame(name):  # before it is matched, for that may take longer than a life
        raise ConfigError(
            f"skip_modules: {name!r} is more of an expression than config.json may hold: three repetitions at most, "
            "and none of a group; give several simpler ones"
        )
    if all(should_convert_module(path, [name]) for path, _ in model.named_modules()):
        raise ConfigError(f"skip_modules names {name!r}, which matches no module of the model")


def is_nf4_checkpoint(path: str | Path, trust_remote_code: bool = False) -> bool:
    """Whether this is an NF4 checkpoint rather than a 16-bit model; of a Hub id only the config is fetched.

    Raises:
        CheckpointError: no model, or quantized in another way.
    """
    return is_nf4(load_config(path, trust_remote_code), path)


def load_config(path: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model's directory, of the file itself or of a Hub id.

    Raises:
        CheckpointError: there is no model, or its config is nonsense.
    """
    if not (Path(path).is_file() and Path(path).suffix == ".json"):
        check_model(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_config(config.to_dict())
    except Exception as error:
        # a config may be nonsense in more ways than there are kinds of errors
        raise unusable(path, "config.json", error) from None
    return config


def _check_config(content: dict[str, Any]) -> None:
    """What transformers would work on for hours: modules made one by one, and expressions that never match."""
    for name, value in content.items():
        if isinstance(value, dict):
            _check_config(value)
        elif str(name).endswith(("layer", "layers")) and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"{name} is {shown(value)}, and no model has more than {_MOST_LAYERS:,}")
    for pattern in content.get("llm_int8_skip_modules") or ():
        if not is_tame(pattern):
            raise ValueError(f"llm_int8_skip_modules holds {shown(pattern)}, no name nor a simple pattern")


def quantization_of(config: PretrainedConfig) -> dict[str, Any]:
    """What the config says of how the model is quantized; empty if it is not."""
    quantization = getattr(config, "quantization_config", None)
    return quantization if isinstance(quantization, dict) else getattr(quantization, "to_dict", dict)()


def is_nf4(config: PretrainedConfig, directory: str | Path) -> bool:
    """Whether the model is in NF4 rather than 16 bits.

    Args:
        directory: as the user named it, for the error.

    Raises:
        CheckpointError: quantized in another way.
    """
    found = quantization_of(config)
    if not found:
        return False
    if found.get("load_in_4bit"):
        kind = found.get("bnb_4bit_quant_type") or "fp4"  # as bitsandbytes takes a config that names none
        if kind == "nf4":
            return True
    else:
        kind = "8-bit bitsandbytes" if found.get("load_in_8bit") else found.get("quant_method")
    raise CheckpointError(f"{directory} is quantized as {kind!s}; start from its 16-bit original, or from NF4")
