"""Streaming the frozen base: layers wait in host memory and pass through two slots on the device.

The idea. A decoder layer's base weights never change, so a copy that the device has done with is dropped, not written
back; and they are used in a known order, up in the forward, down in the backward. So the device holds two slots, each
as large as the largest layer. Layer i always lands in slot i mod 2: its tensors are windows on that slot, made once. As
layer i starts, the copy of the next one into the other slot is under way behind its arithmetic. Where the forward turns
into the backward, and a step into the next, both slots already hold what is needed.

The constraint. A weight that computes with another layer's bytes would be wrong in silence. Therefore nothing hangs on
hooks of modules, on the order of layers or on checkpointing: each use of a base weight asks for its layer first, and if
that is not in its slot, it is fetched and waited for. The order is only a guess at what to fetch ahead.

The rejected alternatives. accelerate's offloading hooks take the weights away after the forward, before the gradient of
the inputs has been computed with them, and fetch nothing ahead. FSDP2 with CPU offloading, in a group of one process,
does the same job (`scripts/bench_stream.py`: on a CPU equal in time and memory to within 4 %; on a GPU not measured
yet). But it copies every weight out of the checkpoint's mapped file, gathers a layer into a buffer and copies it out
of it again, and needs a process group and torch's leave to shard bytes.

Where the layers wait: in a few pinned blocks each, so that a layer is a few copies, if the host has room for that;
otherwise as they were loaded, mapped from the checkpoint's files, which costs no memory that the system cannot take
back, but then a copy may hold up who asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn

from qdora.base import BaseWeight
from qdora.dora import FrozenLinear
from qdora.errors import ConfigError
from qdora.inject import decoder_layers, freeze_dense

__all__ = ["LayerStream", "StreamedWeight", "layer_bytes", "pinned_pieces", "stream_base"]

_ALIGNMENT = 256
# Pinned memory cannot be swapped out: what is left must do for the rest of the machine.
_PINNED_SHARE = 0.7
_SMALLEST_PIECE = 2**20


def stream_base(model: nn.Module, device: torch.device) -> LayerStream:
    """Take the base weights of a model's decoder layers off to the host, in place; before adapters are attached.

    Args:
        model: loaded on the CPU; what is not streamed is left there for the caller to move.
        device: where the arithmetic will be.

    Raises:
        ConfigError: the model has no decoder layers.
    """
    layers = []
    for layer in decoder_layers(model):
        freeze_dense(layer)
        layers.append([module for module in layer.modules() if isinstance(module, FrozenLinear)])
    weights: list[list[Any]] = [[linear.base for linear in linears] for linears in layers]
    total = sum(map(layer_bytes, weights))
    room = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    pin = device.type != "cpu" and total < _PINNED_SHARE * room
    stream = LayerStream(weights, device, pin)
    for index, linears in enumerate(layers):
        for linear in linears:
            linear.base = StreamedWeight(linear.base, stream, index)
    return stream


def layer_bytes(weights: Sequence[nn.Module]) -> int:
    """What these weights take in a slot."""
    return sum(_aligned(tensor.nbytes) for weight in weights for _, _, tensor in _tensors(weight))


def pinned_pieces(size: int) -> list[slice]:
    """How to lay so many bytes into pinned memory: torch rounds each block of it up to a power of two."""
    pieces, start = [], 0
    while start < size:
        power = max(1 << ((size - start).bit_length() - 1), _SMALLEST_PIECE)
        pieces.append(slice(start, min(start + power, size)))
        start += power
    return pieces


class LayerStream:
    """The layers on the host and the slots on the device.

    Args:
        layers: the base weights of each layer, on the CPU. Their tensors become windows on the slots.
        device: of the slots.
        pin: copy each layer into pinned memory; False leaves it where it is.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Module]], device: torch.device, pin: bool) -> None:
        self.device = device
        size = max(map(layer_bytes, layers), default=0)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(layers)))]
        self._copies = [self._bind(weights, number, pin) for number, weights in enumerate(layers)]
        self._held: list[int | None] = [None] * len(self.slots)
        self._current: int | None = None
        self._copier = _Copier(device, len(self.slots))

    def _bind(self, weights: Sequence[nn.Module], number: int, pin: bool) -> list[tuple[Tensor, Tensor]]:
        """Turn a layer's tensors into windows; what is returned fills them: (on the host, in the slot)."""
        slot = self.slots[number % len(self.slots)]
        block = torch.empty(layer_bytes(weights) if pin else 0, dtype=torch.uint8)
        copies = []
        start = 0
        for weight in weights:
            for owner, name, tensor in _tensors(weight):
                window = slot[start : start + tensor.nbytes]
                source = tensor.detach().contiguous().view(-1).view(torch.uint8)
                if pin:
                    block[start : start + tensor.nbytes].copy_(source)
                copies.append((source, window))
                _replace(owner, name, window.view(tensor.dtype).view(tensor.shape))
                start += _aligned(tensor.nbytes)
        return [(block[piece].pin_memory(), slot[piece]) for piece in pinned_pieces(len(block))] if pin else copies

    def require(self, index: int) -> None:
        """Return when what is asked of the device from now on finds this layer in its slot."""
        if index == self._current:
            return
        if not self._holds(index):
            self._current = None  # whose slot this may be
            self._fetch(index)
        self._copier.wait_for(index % len(self.slots))
        # At the first layer too: a pass may begin there after one that ended at the last, with no backward between.
        upwards = self._current is None or index > self._current or index == 0
        self._current = index
        ahead = index + 1 if upwards else index - 1
        if 0 <= ahead < len(self._copies) and not self._holds(ahead):
            self._fetch(ahead)

    def _holds(self, index: int) -> bool:
        return self._held[index % len(self.slots)] == index

    def _fetch(self, index: int) -> None:
        number = index % len(self.slots)
        self._held[number] = None  # until it is whole: an interrupt may leave it half filled
        self._copier.copy(self._copies[index], number)
        self._held[number] = index


class StreamedWeight(nn.Module):
    """A base weight whose layer is fetched before each use.

    Its state is the layer's own, copied to the host; no other can be loaded. It cannot be copied.

    Args:
        weight: its tensors are windows on a slot of the stream.
    """

    def __init__(self, weight: Any, stream: LayerStream, layer: int) -> None:
        super().__init__()
        self.weight, self.stream, self.layer = weight, stream, layer
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.register_state_dict_post_hook(_copy_what_the_slot_holds)
        self.register_load_state_dict_pre_hook(_refuse_other_weights)

    def __deepcopy__(self, memo: Any) -> Self:
        """
        Raises:
            ConfigError: always. The copy's weights would be windows on nothing.
        """
        raise ConfigError(
            "a model whose base is streamed cannot be copied; a reference that shares its base is "
            "qdora.reference_model(model)"
        )

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def fetched(self) -> BaseWeight:
        """The weight itself, its layer in place."""
        self.stream.require(self.layer)
        return self.weight

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """To be walked at once, before another layer is used."""
        return self.fetched().tiles(dtype)

    def linear(self, x_TI: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        return self.fetched().linear(x_TI, row_scale_O)

    def linear_transposed(self, g_TO: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        return self.fetched().linear_transposed(g_TO, row_scale_O)

    def row_norms_squared(self) -> Tensor:
        return self.fetched().row_norms_squared()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.fetched().dequantize(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        return self  # moved or cast, the windows would be windows no longer


def _copy_what_the_slot_holds(module: StreamedWeight, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put copies in the place of windows, which show another layer later."""
    module.fetched()
    for key in [key for key in state if key.startswith(prefix)]:
        state[key] = state[key].to("cpu", copy=True)


def _refuse_other_weights(module: StreamedWeight, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded goes into a slot, and is lost with the next layer: so it must be what is there."""
    module.fetched()
    for name, own in module.named_parameters():
        given = state.get(prefix + name)
        if given is not None and not torch.equal(given.to(own.device), own):
            raise ConfigError(
                "other weights cannot be loaded into a base that is streamed; load the model from their directory"
            )


class _Copier:
    """Copies into slots behind the arithmetic; on a device without streams, at once."""

    def __init__(self, device: torch.device, slots: int) -> None:
        self._device = device
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        if self._module is not None and hasattr(self._module, "Stream"):
            self._stream = self._module.Stream(device)
            self._ready = [self._module.Event() for _ in range(slots)]
        else:
            self._stream = None

    def copy(self, copies: list[tuple[Tensor, Tensor]], number: int) -> None:
        if self._stream is None:
            for source, window in copies:
                window.copy_(source)
            return
        # Whatever still reads the slot was asked of the device before now.
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            for source, window in copies:
                window.copy_(source, non_blocking=True)
            self._ready[number].record(self._stream)

    def wait_for(self, number: int) -> None:
        if self._stream is not None:
            self._module.current_stream(self._device).wait_event(self._ready[number])


def _tensors(weight: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of everything that a base weight holds."""
    return [
        (module, name, tensor)
        for module in weight.modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]


def _replace(owner: nn.Module, name: str, window: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(window, requires_grad=False)
    else:
        owner._buffers[name] = window


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
