"""FSDP2: each process holds a part of every weight, and a layer is whole only while it computes.

What is sharded. Each decoder layer is a unit: its packed weights and their absmax (frozen bytes), its adapters, the
weights of its norms. torch gathers a unit as bytes, so that the dtypes may differ (only what trains must be of one);
gradients are reduced for the adapters alone. The input embedding is a unit of its own if it is not the head too. The
rest (head, last norm) is the root's, and the root is the `ScoredModel`, for its forward is where the loss is computed.

Why not accelerate's preparation. It shards a model that is whole, with its adapters on the CPU; it upcasts, it maps an
optimizer's parameters by address, and saving gathers the base. Here a layer goes to the device, gets its adapters there
(with the random numbers that one process would draw, and norms computed where that is fast) and is sharded before the
next one: the device never holds more than its part and one layer. Every process loads the checkpoint's files mapped
into memory, so that those of one machine share the pages; nothing is broadcast.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from qdora.config import AdapterConfig
from qdora.distributed import local, processes
from qdora.dora import DoRALinear
from qdora.errors import ConfigError, reason
from qdora.inject import adapt, decoder_layers, prepare_targets
from qdora.nf4 import NF4Weight
from qdora.scoring import ScoredModel

__all__ = ["Sharding", "attach_and_shard", "shard_root", "take_sharding"]


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded over all processes."""

    device: torch.device
    """Of this process."""
    reshard_after_forward: bool = True
    """Give a layer's gathered weights up between forward and backward; False takes memory to save a gathering."""
    layer_classes: tuple[str, ...] = ()
    """Names of the layers' classes, if the user gave them."""

    def mesh(self) -> DeviceMesh:
        """All processes in one row."""
        return init_device_mesh(self.device.type, (processes(),))


def take_sharding(training: Any) -> Sharding | None:
    """What the flags (`--fsdp`) or accelerate's config ask for, taken off the trainer, for the sharding is done here.

    Args:
        training: TRL's `SFTConfig`; without its FSDP settings afterwards, as is the environment.

    Returns:
        None if nothing is to be sharded.

    Raises:
        ConfigError: FSDP version 1, a single process, or a setting that this sharding has not.
    """
    by_launcher = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    # With it, transformers would load the weights in one process only.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    settings = training.fsdp_plugin_args or {}
    if not training.fsdp and not by_launcher:
        return None
    version = settings.get("fsdp_version") or int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise ConfigError(f"FSDP version {version} flattens weights of different kinds; set fsdp_version to 2")
    if processes() == 1:
        raise ConfigError("--fsdp shards over several processes, and this is the only one; launch with torchrun")
    try:
        plugin = FullyShardedDataParallelPlugin(**{**settings, "cpu_ram_efficient_loading": False})
    except (ValueError, ImportError) as error:
        raise ConfigError(f"these FSDP settings do not fit together: {reason(error)}") from None
    _check_settings(plugin)
    training.fsdp, training.fsdp_config, training.fsdp_plugin_args = None, None, None
    return Sharding(
        training.device, bool(plugin.reshard_after_forward), tuple(plugin.transformer_cls_names_to_wrap or ())
    )


def _check_settings(plugin: Any) -> None:
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("FSDP's CPU offloading is not supported; leave it out, or use --stream_base without FSDP")
    if plugin.activation_checkpointing:
        raise ConfigError("FSDP's activation checkpointing is not supported; use --gradient_checkpointing true")
    if plugin.ignored_modules is not None:
        raise ConfigError("FSDP's ignored_modules is not supported; every weight is sharded")
    if plugin.auto_wrap_policy not in (None, transformer_auto_wrap_policy):
        raise ConfigError("FSDP's units are the decoder layers; use TRANSFORMER_BASED_WRAP")


def attach_and_shard(model: Any, config: AdapterConfig, sharding: Sharding) -> None:
    """Give a model on the CPU its adapters and shard its decoder layers and embedding, layer by layer, in place.

    What is left whole and where it is (the last norm, the head) is for `shard_root`.

    Raises:
        ConfigError: as `attach`; or the layers are of another class than the user named, or cannot be sharded.
    """
    targets = prepare_targets(model, config)
    layers = decoder_layers(model)
    _check_classes(layers, sharding.layer_classes)
    mesh = sharding.mesh()
    for path, layer in [(path, module) for path, module in model.named_modules() if module in layers]:
        layer.to(sharding.device)
        for target in [target for target in targets if target.startswith(f"{path}.")]:
            adapt(model, target, config)
            targets.remove(target)
        _shard(layer, mesh, sharding.reshard_after_forward)
    for target in targets:
        model.get_submodule(target).to(sharding.device)
        adapt(model, target, config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        _shard(embedding.to(sharding.device), mesh, sharding.reshard_after_forward)


def shard_root(scored: ScoredModel, sharding: Sharding) -> None:
    """Shard what `attach_and_shard` left whole, and let the forward of `scored` be the entry, in place."""
    _shard(scored, sharding.mesh(), None)
    for layer in scored.modules():
        if isinstance(layer, DoRALinear):
            layer.watch([local(p) for p in layer.parameters(recurse=False) if p.requires_grad])


def _shard(module: nn.Module, mesh: DeviceMesh, reshard: bool | None) -> None:
    for weight in module.modules():
        if isinstance(weight, NF4Weight):
            weight.pass_for_floats()
    try:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    except NotImplementedError as error:
        raise ConfigError(f"FSDP2 cannot shard {type(module).__name__}: {reason(error)}") from None


def _check_classes(layers: list[nn.Module], wanted: tuple[str, ...]) -> None:
    found = sorted({type(layer).__name__ for layer in layers})
    if wanted and not set(found) <= set(wanted):
        raise ConfigError(
            f"FSDP is to wrap {', '.join(wanted)}; the model's layers are {', '.join(found)}: leave it out"
        )
