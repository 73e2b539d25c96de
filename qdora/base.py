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
    def device(self) -> torch.device:
        """Where it is multiplied."""

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices of whole rows and their values; a tile may be overwritten when the next one is asked for."""

    def linear(self, x_TI: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        """x·(c·W)ᵀ: (T, O), in x's dtype; `row_scale_O` is c, one factor for each row, in fp32."""

    def linear_transposed(self, g_TO: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        """g·(c·W): (T, I), in g's dtype."""

    def row_norms_squared(self) -> Tensor:
        """‖W‖² of each row: (O,) fp32."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, whole."""


class KeepsDtype(nn.Module):
    """A module whose tensors follow the model to a device but not to another dtype.

    `model.to(torch.bfloat16)` or `.half()` would round an absmax or a norm, and so change the function in silence.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)
