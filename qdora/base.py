"""What the adapter layer asks of a frozen base weight, and a module that keeps its dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, Self

import torch
from torch import Tensor, nn

__all__ = ["BaseWeight", "KeepsDtype"]


class BaseWeight(Protocol):
    """A frozen (O, I) matrix, known only by its products; `nf4.NF4Weight` and `dense.DenseWeight` provide it."""

    out_features: int
    in_features: int

    @property
    def device(self) -> torch.device: ...
    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]: ...
    def linear(self, x_TI: Tensor, row_scale_O: Tensor | None = None) -> Tensor: ...
    def linear_transposed(self, g_TO: Tensor, row_scale_O: Tensor | None = None) -> Tensor: ...
    def row_norms_squared(self) -> Tensor: ...
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor: ...


class KeepsDtype(nn.Module):
    """A module whose tensors follow the model to a device but not to another dtype.

    `model.to(torch.bfloat16)` or `.half()` would round an absmax or a norm, and so change the function in silence.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)
