"""Loading models: the only file that knows how transformers does it.

What comes out is an ordinary transformers model whose 4-bit linears and experts are ours. transformers marks a model
that it loaded in 4 bits, and its trainers refuse one that is marked "purely quantized" by those marks, not by what can
be trained; since the linears are ours, the marks would be untrue, and they are taken off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qdora import checkpoint, stream
from qdora.config import AdapterConfig
from qdora.dora import FrozenLinear
from qdora.errors import CheckpointError, ConfigError, out_of_memory, reason, shown
from qdora.experts import expand_experts, router_paths, stacks_left
from qdora.inject import attach, freeze_packed, linear_paths, linear_shape
from qdora.kinship import origin_of
from qdora.loader import KeyNames, NF4Config, check_complete, fill_experts, key_names, take_off_marks
from qdora.nf4 import NF4Weight
from qdora.offload import keep_embedding_on_host
from qdora.patterns import is_tame
from qdora.saving import save_as_adapter
from qdora.sharding import Sharding, attach_and_shard
from qdora.shards import ShardReader
from qdora.sources import local_model, quietly, unusable

__all__ = [
    "Linears",
    "ModelFacts",
    "compute_dtype",
    "context_of",
    "hollow_model",
    "load_model",
    "model_facts",
    "model_linears",
    "pick_device",
    "usual_dtype",
]

_MOST_LAYERS = 1_000
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    path: str | Path,
    adapter: AdapterConfig | str | Path | None = None,
    *,
    dtype: str = "bfloat16",
    device: str | torch.device | None = None,
    load_in_4bit: bool = True,
    stream_base: bool = False,
    embedding_on_host: bool = False,
    sharding: Sharding | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> PreTrainedModel:
    """Load a causal language model with frozen base weights, and adapters attached if asked for.

    Args:
        path: an NF4 checkpoint, a 16-bit model directory or a Hub id.
        adapter: an `AdapterConfig` for fresh adapters, or an adapter directory (ours or PEFT's).
        dtype: of the arithmetic, and of what is not quantized.
        device: defaults to the accelerator, if there is one.
        load_in_4bit: quantize a 16-bit model to NF4 as it loads; False leaves its base weights dense.
        stream_base: leave the decoder layers' base weights on the host; two layers at a time are on the device.
        embedding_on_host: leave the input embedding on the host.
        sharding: shard the model over all processes (FSDP2), with fresh adapters; see `sharding.shard_root` for what
            is left to do.
        trust_remote_code: let a model run Python code of its own. Off unless you trust where it comes from.
        allow_other_base: load an adapter onto other weights than it was trained on, see `kinship`.

    Returns:
        A transformers model; with an adapter, exactly the adapter's parameters require gradients. Its
        `qdora_base_hash` is the fingerprint of the files, which `save_adapter` records; its `save_pretrained` writes
        the adapter.

    Raises:
        CheckpointError: not a model, damaged, or the adapter is for another one.
        ConfigError: an argument is wrong.
    """
    source, place, arithmetic = local_model(path), pick_device(device), compute_dtype(dtype)
    _check_alone(source)
    if sharding is not None:
        _check_sharded(adapter, stream_base or embedding_on_host)
    loading_place = torch.device("cpu") if stream_base or embedding_on_host or sharding else place
    model, reader = _frozen_base(path, source, arithmetic, loading_place, load_in_4bit, trust_remote_code)
    if stream_base:
        stream.stream_base(model, place)
    if embedding_on_host:
        keep_embedding_on_host(model, place)
    model.config._name_or_path = str(path)
    origin = origin_of(source, reader)
    model.qdora_base_hash, model.qdora_base_source = origin.hash, origin.source
    if sharding is None:
        model.to(place)
    if isinstance(adapter, AdapterConfig):
        if sharding is None:
            attach(model, adapter)
        else:
            attach_and_shard(model, adapter, sharding)
        model.qdora_adapter = adapter
    elif adapter is not None:
        checkpoint.load_adapter(model, adapter, allow_other_base)
    return model


def _check_sharded(adapter: AdapterConfig | str | Path | None, partly_on_host: bool) -> None:
    if partly_on_host or not isinstance(adapter, AdapterConfig):
        raise ConfigError("a sharded model takes fresh adapters, and neither stream_base nor embedding_on_host")
    if adapter.modules_to_save:
        raise ConfigError("a sharded model trains no modules_to_save; leave them or the sharding out")


def _frozen_base(
    path: str | Path, source: Path, dtype: torch.dtype, place: torch.device, load_in_4bit: bool, trust_remote_code: bool
) -> tuple[Any, ShardReader]:
    """The model as transformers loads it, with linears and experts of ours, and the reader of its files.

    Args:
        path: as the user named it, for errors.
        source: where its files are.
        place: where it is loaded to.
    """
    config = _load_config(source, trust_remote_code)
    packed = _check_quantization(config, source)
    reader = ShardReader(source)  # finds damaged files, and says so better than the loading below
    in_nf4 = packed or load_in_4bit
    if packed:
        config.quantization_config = NF4Config.of_checkpoint(_quantization_of(config))
    try:
        with quietly():
            model, found = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                quantization_config=NF4Config.on_the_fly(dtype) if in_nf4 and not packed else None,
                device_map={"": place},
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:
        if out_of_memory(error):
            raise
        # a config that contradicts its weights ends in almost any kind of error
        raise CheckpointError(f"{path} cannot be loaded: {reason(error)}") from None
    check_complete(found, path)
    freeze_packed(model, dtype)
    take_off_marks(model)
    save_as_adapter(model)
    _cast_parameters(model, dtype)
    if in_nf4:
        fill_experts(model, reader, not packed, dtype, place)
    else:
        expand_experts(model)
    model.requires_grad_(False)
    return model, reader


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config says."""

    context: int | None
    """How many tokens it takes."""
    in_nf4: bool


def model_facts(path: str | Path, trust_remote_code: bool = False) -> ModelFacts:
    """From the config alone; of a Hub id nothing else is fetched.

    Raises:
        CheckpointError: no model, or quantized otherwise than in NF4.
    """
    config = _load_config(path, trust_remote_code)
    return ModelFacts(context_of(config), _check_quantization(config, path))


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

    def find(self, key: str) -> str | None:
        """The path of the linear whose weight is stored under this key; None if it is no linear's."""
        path = key.removesuffix(".weight")
        return None if path == key else self.named(path, self.transposed)

    def named(self, name: str, known: Container[str]) -> str | None:
        """What a checkpoint calls `name` as the model calls it, if it is among the known names."""
        return next((candidate for candidate in self.names.candidates(name) if candidate in known), None)

    def quantizes(self, path: str) -> bool:
        """Whether this linear becomes NF4."""
        return _becomes_nf4(path, list(self.skipped))


def model_linears(directory: Path, skip_modules: tuple[str, ...] = (), trust_remote_code: bool = False) -> Linears:
    """Build the architecture without weights and list its linears.

    Raises:
        CheckpointError: the directory is no causal language model.
        ConfigError: a module to skip matches nothing.
    """
    model = _without_weights(_load_config(directory, trust_remote_code), directory, torch.float32, trust_remote_code)
    for name in skip_modules:
        _check_skip(name, model)
    head = model.get_output_embeddings()
    heads = tuple(path for path, module in model.named_modules() if module is head and head is not None)
    linears = {path: model.get_submodule(path) for path in linear_paths(model)}
    transposed = {path: isinstance(linear, Conv1D) for path, linear in linears.items()}
    shapes = {path: linear_shape(linear) for path, linear in linears.items()}
    stays = (*heads, *router_paths(model), *skip_modules)
    embeddings = [path for path, module in model.named_modules() if module is model.get_input_embeddings()]
    ends = (f"{embeddings[0]}.weight", f"{heads[0]}.weight") if embeddings and heads else None
    return Linears(transposed, stays, shapes, key_names(model), tuple(stacks_left(model)), ends)


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
    config = _load_config(path, trust_remote_code)
    packed = _check_quantization(config, path)
    how = _quantization_of(config) if packed else {}
    model = _without_weights(config, path, compute_dtype(dtype), trust_remote_code)
    if packed or load_in_4bit:
        skipped = list(how.get("llm_int8_skip_modules") or ())
        with torch.device("meta"):
            for name in linear_paths(model):
                if _becomes_nf4(name, skipped):
                    _make_hollow(model, name, bool(how.get("bnb_4bit_use_double_quant", True)))
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
        if all(should_convert_module(path, [name]) for path, _ in model.named_modules()):
            raise ConfigError(f"skip_modules names {name!r}, which matches no module of the model")
    except re.error as error:
        raise ConfigError(f"skip_modules: {name!r} is neither a name nor a regular expression ({error})") from None


def is_nf4_checkpoint(directory: Path, trust_remote_code: bool = False) -> bool:
    """Whether the directory holds an NF4 checkpoint rather than a 16-bit model.

    Raises:
        CheckpointError: quantized in another way.
    """
    return _check_quantization(_load_config(directory, trust_remote_code), directory)


def compute_dtype(name: str, sixteen_bit: bool = False) -> torch.dtype:
    """
    Raises:
        ConfigError: not one of the three, or with `sixteen_bit` of the first two.
    """
    known = [dtype for dtype in _DTYPES if not sixteen_bit or dtype != "float32"]
    if name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, found {name!r}")
    return _DTYPES[name]


def usual_dtype(directory: Path, with_adapter: bool, device: torch.device) -> str:
    """bfloat16, in which adapters are trained; but weights in float16 would lose three bits by it.

    CPUs multiply in float16 ten times as slowly (512 × 576 × 1,536: 23 ms, and 6 in float32), so there it is float32.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if with_adapter or "float16" not in (config.get("dtype"), config.get("torch_dtype")):
        return "bfloat16"
    return "float32" if device.type == "cpu" else "float16"


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the accelerator, if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        return PartialState().device
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"no device {str(device)!r} here: {reason(error)}") from None
    return picked


def _load_config(directory: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        _check_config(config.to_dict())
    except Exception as error:
        # a config may be nonsense in more ways than there are kinds of errors
        raise unusable(directory, "config.json", error) from None
    return config


def _check_config(content: dict[str, Any]) -> None:
    """What transformers would work on for hours: modules made one by one, and expressions that never match."""
    for name, value in content.items():
        if isinstance(value, dict):
            _check_config(value)
        elif "layer" in str(name) and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"{name} is {shown(value)}, and no model has more than {_MOST_LAYERS:,}")
    for pattern in content.get("llm_int8_skip_modules") or ():
        if not is_tame(pattern):
            raise ValueError(f"llm_int8_skip_modules holds {shown(pattern)}, no name nor a simple pattern")


def _quantization_of(config: PretrainedConfig) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None)
    return quantization if isinstance(quantization, dict) else getattr(quantization, "to_dict", dict)()


def _check_quantization(config: PretrainedConfig, directory: str | Path) -> bool:
    found = _quantization_of(config)
    if not found:
        return False
    if found.get("load_in_4bit") and found.get("bnb_4bit_quant_type") == "nf4":
        return True
    kind = found.get("bnb_4bit_quant_type") if found.get("load_in_4bit") else found.get("quant_method")
    raise CheckpointError(f"{directory} is quantized as {kind!s}; start from its 16-bit original, or from NF4")


def _check_alone(directory: Path) -> None:
    """transformers would load an adapter that lies beside a model, and whatever model that names as its base."""
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} holds an adapter (adapter_config.json) beside the model; move one to another directory"
        )


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """transformers leaves what is not quantized in the checkpoint's own dtype, whatever dtype it was asked for.

    Not `model.to`: that would round buffers too, such as the rotary frequencies. What transformers keeps in fp32, it
    keeps so for a reason.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def trainable_parameters(model: nn.Module) -> int:
    """How many values train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
