"""What the device can do without for a while: the layers' inputs and the input embedding, kept on the host.

Under gradient checkpointing a step keeps one tensor a layer for the backward: the layer's input. `HostInputs` is a
checkpointing function that parks just that in pinned host memory, behind the arithmetic, and fetches it back a layer
ahead. Nothing else is parked: offloading whatever autograd saves, the recompute's tensors too, halves the speed.

The input embedding is a lookup of a few rows. `HostEmbedding` looks them up on the host and sends them over.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qdora.errors import ConfigError
from qdora.inject import decoder_layers
from qdora.origin import version_of

__all__ = ["HostEmbedding", "HostInputs", "keep_embedding_on_host"]


def keep_embedding_on_host(model: Any, device: torch.device) -> None:
    """Leave the input embedding of a model on the CPU for good, in place.

    Raises:
        ConfigError: the output head shares its weight, and the head must be on the device.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise ConfigError("the input embedding is the output head's weight in this model; leave out embedding_on_host")
    model.set_input_embeddings(HostEmbedding(embedding.to("cpu"), device))


class HostEmbedding(nn.Module):
    """An embedding that stays on the CPU and answers on the device."""

    def __init__(self, embedding: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.embedding, self.device = embedding, device

    @property
    def weight(self) -> Tensor:
        """(vocabulary, hidden), on the CPU."""
        return self.embedding.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        looked_up: Tensor = self.embedding(ids.to(self.weight.device))
        return looked_up.to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self  # stays where it is


class HostInputs:
    """Non-reentrant checkpointing of layers, their inputs waiting on the host: `HostInputs(device).install(model)`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._module = module
        self._stream: Any = module.Stream(device) if hasattr(module, "Stream") else None
        self._waiting: list[weakref.ref[_Parked]] = []

    def install(self, model: nn.Module) -> None:
        """Use this for the decoder layers, once the model has gradient checkpointing enabled."""
        for layer in decoder_layers(model):
            layer._gradient_checkpointing_func = self  # type: ignore[assignment]

    def __call__(self, layer: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
        """What `torch.utils.checkpoint.checkpoint` does, for a layer whose first argument is its input.

        Raises:
            ConfigError: the layer changes its input in place. A copy of it begins to count its changes anew, so that
                nobody behind the host could tell.
        """
        version = version_of(hidden)
        # Not `hidden` itself: autograd keeps this function for as long as what it packed.
        storage, shape = hidden.untyped_storage()._cdata, hidden.shape

        def pack(tensor: Tensor) -> Tensor | _Parked:
            is_input = tensor.untyped_storage()._cdata == storage and tensor.shape == shape
            return self._park(tensor) if is_input else tensor

        with saved_tensors_hooks(pack, self._unpack):
            result = checkpoint(layer, hidden, *others, use_reentrant=False)
        if version_of(hidden) != version:
            raise ConfigError("a decoder layer changes its input in place; leave activation_offloading out")
        return result

    def _park(self, tensor: Tensor) -> _Parked:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        with self._aside():
            host.copy_(tensor, non_blocking=True)
        if self._stream is not None:
            tensor.record_stream(self._stream)
        parked = _Parked(host)
        self._waiting.append(weakref.ref(parked))
        return parked

    def _unpack(self, packed: Tensor | _Parked) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._bring(packed)
        tensor, packed.back = packed.back, None
        assert tensor is not None
        if self._stream is not None:
            now = self._module.current_stream(self._device)
            now.wait_event(packed.arrived)
            tensor.record_stream(now)
        # The backward goes down the layers: the one parked before this one is next.
        self._waiting = [ref for ref in self._waiting if ref() is not None and ref() is not packed]
        below = self._waiting[-1]() if self._waiting else None
        if below is not None:
            self._bring(below)
        return tensor

    def _bring(self, parked: _Parked) -> None:
        if parked.back is None:
            with self._aside():
                parked.back = parked.host.to(self._device, copy=True, non_blocking=True)
                if self._stream is not None:
                    parked.arrived = self._module.Event()
                    parked.arrived.record(self._stream)

    def _aside(self) -> Any:
        """The stream beside the arithmetic, from where that stands now."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(self._module.current_stream(self._device))
        return self._module.stream(self._stream)


class _Parked:
    """A layer's input on the host, and on its way back."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.back: Tensor | None = None
        self.arrived: Any = None
