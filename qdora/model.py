"""Loading models, as transformers does it.

What comes out is an ordinary transformers model whose 4-bit linears and experts are ours. transformers marks a model
that it loaded in 4 bits, and its trainers refuse one that is marked "purely quantized" by those marks, not by what can
be trained; since the linears are ours, the marks would be untrue, and they are taken off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qdora import checkpoint, stream
from qdora.adapterfile import CONFIG_FILE, read_adapter
from qdora.architecture import is_nf4, is_nf4_checkpoint, load_config, quantization_of
from qdora.arithmetic import compute_dtype, pick_device, training_dtype, usual_dtype
from qdora.config import AdapterConfig
from qdora.errors import CheckpointError, ConfigError, out_of_memory, reason
from qdora.experts import expand_experts
from qdora.inject import attach, freeze_packed, make_lean
from qdora.kinship import ancestry_of
from qdora.loader import NF4Config, fill_experts, take_off_marks
from qdora.offload import keep_embedding_on_host
from qdora.saving import save_as_adapter
from qdora.sharding import Sharding, attach_and_shard
from qdora.shards import ShardReader
from qdora.sources import check_complete, local_model, quietly

__all__ = ["load_model", "load_to_answer", "trainable_parameters"]


def load_model(
    path: str | Path,
    adapter: AdapterConfig | str | Path | None = None,
    *,
    dtype: str | None = None,
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
        dtype: of the arithmetic, and of what is not quantized; bfloat16, or float32 on a CPU that is slow in that.
        device: defaults to the accelerator, if there is one.
        load_in_4bit: quantize a 16-bit model to NF4 as it loads; False leaves its base weights dense.
        stream_base: leave the decoder layers' base weights on the host; two layers at a time are on the device.
        embedding_on_host: leave the input embedding on the host.
        sharding: shard the model over all processes (FSDP2), with fresh adapters; see `sharding.shard_root` for what
            is left to do.
        trust_remote_code: let a model run Python code of its own. Off unless you trust where it comes from.
        allow_other_base: load an adapter onto other weights than it was trained on, see `kinship`.

    Returns:
        A transformers model; with an adapter, exactly what the adapter trains requires gradients: magnitudes, A and B,
        and the copies of modules that are trained whole. Its `qdora_base_hash` is the fingerprint of the files, which
        `save_adapter` records; its `save_pretrained` writes the adapter.

    Raises:
        CheckpointError: not a model, damaged, or the adapter is for another one.
        ConfigError: an argument is wrong.
    """
    source, place = local_model(path), pick_device(device)
    arithmetic = compute_dtype(dtype or training_dtype(place))
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
    ancestry = ancestry_of(source, reader)
    model.qdora_base_hash, model.qdora_base_source = ancestry.hash, ancestry.source
    model.qdora_base_merged = ancestry.merged
    if sharding is None:
        model.to(place)
    if isinstance(adapter, AdapterConfig):
        _attach_fresh(model, adapter, sharding)
    elif adapter is not None:
        checkpoint.load_adapter(model, adapter, allow_other_base)
    return model


def load_to_answer(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    load_in_4bit: bool | None = None,
    stream_base: bool = False,
    embedding_on_host: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> tuple[PreTrainedModel, str]:
    """`load_model`, as the adapter met its base in training where nothing else is said.

    Args:
        dtype: by default `arithmetic.usual_dtype`.
        load_in_4bit: by default a 16-bit model is quantized only if its adapter was trained on NF4.

    Returns:
        The model in eval mode, and what its weights are, in words.

    Raises:
        CheckpointError, ConfigError: as `load_model`.
    """
    source, place = local_model(path), pick_device(device)
    file = None if adapter is None else read_adapter(adapter)  # what is wrong with it shows before the model is loaded
    packed = is_nf4_checkpoint(source, trust_remote_code)
    if load_in_4bit is None:
        load_in_4bit = not packed and file is not None and file.rounds(path, "choose by --load_in_4bit")
    model = load_model(
        source,
        adapter,
        dtype=dtype or usual_dtype(source, adapter is not None, place),
        device=place,
        load_in_4bit=load_in_4bit,
        stream_base=stream_base,
        embedding_on_host=embedding_on_host,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    rounded = "rounded to NF4 as it was loaded" if load_in_4bit else "16-bit weights"
    return model.eval(), "NF4 weights" if packed else rounded


def _attach_fresh(model: Any, adapter: AdapterConfig, sharding: Sharding | None) -> None:
    if sharding is None:
        attach(model, adapter)
    else:
        attach_and_shard(model, adapter, sharding)
    model.qdora_adapter = adapter


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
    config = load_config(source, trust_remote_code)
    packed = is_nf4(config, source)
    reader = ShardReader(source)  # finds damaged files, and says so better than the loading below
    in_nf4 = packed or load_in_4bit
    if packed:
        config.quantization_config = NF4Config.of_checkpoint(quantization_of(config))
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
    make_lean(model)
    model.requires_grad_(False)
    return model, reader


def _check_alone(directory: Path) -> None:
    """transformers would load an adapter that lies beside a model, and whatever model that names as its base."""
    if (directory / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{directory} holds an adapter ({CONFIG_FILE}) beside the model; move one to another directory"
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
