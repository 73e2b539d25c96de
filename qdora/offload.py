"""What the device can do without for a while: the layers' inputs and the input embedding, kept on the host.

Under gradient checkpointing a step keeps one tensor a layer for the backward: the layer's input. `HostInputs` is a
checkpointing function that parks just that in pinned host memory, behind the arithmetic, and fetches it back a layer
ahead. Nothing else is parked: offloading whatever autograd saves, the recompute's tensors too, halves the speed.

A tensor stays alive until its copy is done, and the arithmetic waits for the copies of the layers before the last two.
`record_stream` would not hold it up, and then it runs ahead of the copies, each layer's input in a new block.

The input embedding is a lookup of a few rows. `HostEmbedding` looks them up on the host, into pinned memory, and sends
them over behind the layers that are being enqueued. It waits for the token ids, which come from the device.
"""

from __future__ import annotations

import weakref
from collections import deque
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

_COPIES_UNDER_WAY = 2


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
        self._pins = device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")

    @property
    def weight(self) -> Tensor:
        """(vocabulary, hidden), on the CPU."""
        return self.embedding.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.weight.device)
        looked_up: Tensor = self._look_up_pinned(ids) if self._pins else self.embedding(ids)
        return looked_up.to(self.device, non_blocking=self._pins)

    def _look_up_pinned(self, ids: Tensor) -> Tensor:
        """The rows in new pinned memory: torch's allocator gives none of it away that is still copied from."""
        if not _only_looks_up(self.embedding):
            rows: Tensor = self.embedding(ids)
            return torch.empty_like(rows, pin_memory=True).copy_(rows)
        weight = self.weight.detach()
        pinned = torch.empty(ids.numel(), weight.shape[1], dtype=weight.dtype, pin_memory=True)
        torch.index_select(weight, 0, ids.reshape(-1), out=pinned)
        return pinned.view(*ids.shape, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self  # stays where it is


def _only_looks_up(embedding: nn.Module) -> bool:
    """Whether it does nothing that a lookup of rows would not do: Gemma's multiplies, others are of strangers."""
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.weight.requires_grad
    return plain and not (embedding._forward_hooks or embedding._forward_pre_hooks)


class HostInputs:
    """Non-reentrant checkpointing of layers, their inputs waiting on the host: `HostInputs(device).install(model)`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._module = module
        self._stream: Any = module.Stream(device) if hasattr(module, "Stream") else None
        self._pins = self._stream is not None
        self._waiting: list[weakref.ref[_Parked]] = []
        self._under_way: deque[tuple[Tensor, Any]] = deque()
        """Tensors on the device that are copied from or to, each with the event of its end."""

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
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pins)
        with self._aside():
            host.copy_(tensor, non_blocking=True)
        self._hold(tensor.detach())
        self._let_go(all_but=_COPIES_UNDER_WAY)
        parked = _Parked(host)
        self._waiting.append(weakref.ref(parked))
        return parked

    def _unpack(self, packed: Tensor | _Parked) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._bring(packed)
        tensor, packed.back = packed.back, None
        assert tensor is not None
        self._let_go(all_but=0)
        # The backward goes down the layers: the one parked before this one is next.
        self._waiting = [ref for ref in self._waiting if ref() is not None and ref() is not packed]
        below = self._waiting[-1]() if self._waiting else None
        if below is not None:
            self._bring(below)
        return tensor

    def _bring(self, parked: _Parked) -> None:
        if parked.back is None:
            parked.back = torch.empty(parked.host.shape, dtype=parked.host.dtype, device=self._device)
            with self._aside():
                parked.back.data.copy_(parked.host, non_blocking=True)  # which counts as no change, see `origin`
            self._hold(parked.back)

    def _hold(self, tensor: Tensor) -> None:
        """Keep a tensor until the copy that was asked for last is done; without streams it is already."""
        if self._stream is not None:
            done = self._module.Event()
            done.record(self._stream)
            self._under_way.append((tensor, done))

    def _let_go(self, all_but: int) -> None:
        """Let the arithmetic wait for the oldest copies: what it does from then on may use their memory again."""
        while len(self._under_way) > all_but:
            _, done = self._under_way.popleft()
            self._module.current_stream(self._device).wait_event(done)

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
