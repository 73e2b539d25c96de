"""Dense base weights: an ordinary 16- or 32-bit matrix behind the same methods as `nf4.NF4Weight`.

With it, DoRA and LoRA on an unquantized model run through the very same `DoRALinear`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["DenseWeight"]

_TILE_ROWS = 1024
_SCALED_ROWS = 64


class DenseWeight(nn.Module):
    """A frozen (out_features, in_features) weight in a floating dtype.

    Args:
        weight: (O, I), kept as it is and shared, not copied; a transposed view (GPT-2's `Conv1D`) will do.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight.dtype}"

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their weights in `dtype`), a few rows at a time."""
        for start in range(0, self.out_features, _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, self.out_features))
            yield rows, self.weight[rows].to(dtype)

    def linear(self, x_TI: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        """x · (scale ⊙ W)ᵀ, as a (T, O) tensor of x's dtype."""
        if self.weight.dtype == x_TI.dtype:
            y_TO = x_TI @ self.weight.t()
        else:
            y_TO = torch.cat([x_TI @ tile.t() for _, tile in self.tiles(x_TI.dtype)], dim=1)
        return y_TO if row_scale_O is None else _scaled(y_TO, row_scale_O)

    def linear_transposed(self, g_TO: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        """g · (scale ⊙ W), as a (T, I) tensor of g's dtype."""
        scaled_TO = g_TO if row_scale_O is None else _scaled(g_TO.clone(), row_scale_O)
        return scaled_TO @ self.weight.to(g_TO.dtype)

    def row_norms_squared(self) -> Tensor:
        """‖W‖² of each row, as an (O,) fp32 tensor."""
        return torch.cat([tile.square().sum(dim=1) for _, tile in self.tiles(torch.float32)])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, (O, I), in another dtype."""
        return self.weight.to(dtype)


def _scaled(y_TO: Tensor, scale_O: Tensor) -> Tensor:
    """y · scale, in place, multiplied in fp32; on the CPU a few rows at a time.

    There torch multiplies bf16 by fp32 without vector instructions: 33 to 139 ms for 1,024 × 11,008, and this 2.
    """
    if y_TO.device.type != "cpu":
        return y_TO.mul_(scale_O)
    for part in y_TO.split(_SCALED_ROWS):
        part.copy_(part.float().mul_(scale_O))
    return y_TO
