"""Adapters that begin with what rounding to NF4 took from the weights.

NF4 moves a weight by 9 % of its size, and a fresh adapter (B = 0) leaves that as it is. Where the 16-bit original is at
hand, A and B can begin as the best rank-r approximation of what is missing,

    s·B·A ≈ W₁₆ − W        by singular values, as LoftQ does (arXiv 2310.08659, section 3.2),

and the magnitude as ‖W + s·B·A‖, so that the first forward is that of W + s·B·A. Unlike LoftQ, the base is not
quantized again against the adapter: the checkpoint stays the one that everybody else reads, and the adapter an ordinary
one on it.

One weight at a time is read and made dense, so that memory is bounded by the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora.base import BaseWeight
from qdora.baseweights import StoredBase
from qdora.dora import DoRALinear
from qdora.errors import CheckpointError, ConfigError
from qdora.inject import adapted_linears
from qdora.sources import local_model

__all__ = ["Compensation", "begin_with_residual"]

# Of the randomized SVD (Halko et al., arXiv 0909.4061): more directions than asked for, and passes over the matrix.
_OVERSAMPLED, _PASSES = 8, 4
_NO_ERROR = 1e-6  # of the largest singular value, which is about what fp32 tells apart


@dataclass(frozen=True)
class Compensation:
    """What the adapters took over of the quantization error."""

    linears: int
    error_before: float
    """‖W₁₆ − W‖ / ‖W₁₆‖ over all adapted linears, Frobenius."""
    error_after: float
    """The same with s·B·A added to W."""

    def __str__(self) -> str:
        return (
            f"{self.linears} adapters begin with what NF4 took away: the weights' relative error goes from "
            f"{self.error_before:.4f} to {self.error_after:.4f}"
        )


@torch.no_grad()
def begin_with_residual(
    model: nn.Module,
    original: str | Path,
    trust_remote_code: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Compensation:
    """Set every adapter of a model, in place, to the best rank-r part of the error of its NF4 weight.

    Args:
        model: with fresh adapters on NF4 weights.
        original: the 16-bit model that was quantized, a directory or a Hub id.
        progress: wraps the linears, such as tqdm.

    Raises:
        CheckpointError: `original` is not that model.
        ConfigError: the model carries no adapters.
    """
    layers = adapted_linears(model)
    if not layers:
        raise ConfigError("the model has no adapters that could begin with anything")
    weights = _Original(original, trust_remote_code)
    whole = before = after = 0.0
    for path, layer in progress(layers.items()):
        original_OI = weights.read(path, layer).to(layer.lora_A.device)
        error_OI = _subtracted(original_OI, layer.base)
        whole += float(original_OI.square().sum())
        before += float(error_OI.square().sum())
        _take_over(layer, error_OI)
        error_OI.addmm_(layer.lora_B.float(), layer.lora_A.float(), alpha=-layer.scaling)
        after += float(error_OI.square().sum())
    return Compensation(len(layers), (before / whole) ** 0.5, (after / whole) ** 0.5)


class _Original:
    """The weights of the 16-bit model by the paths of its linears."""

    def __init__(self, name: str | Path, trust_remote_code: bool) -> None:
        self._name, directory = name, local_model(name)
        self._stored = StoredBase(directory, trust_remote_code=trust_remote_code)
        if self._stored.is_nf4:
            raise CheckpointError(f"{name} is in NF4 itself; name the 16-bit model that was quantized")
        found = {self._stored.linears.find(key): key for key in self._stored.reader}
        self._keys: Mapping[str, str] = {path: key for path, key in found.items() if path is not None}

    def read(self, path: str, layer: DoRALinear) -> Tensor:
        """(out_features, in_features) fp32."""
        if path not in self._keys:
            raise CheckpointError(f"{self._name} is another model: it has no linear {path!r}")
        weight = self._stored.weight(self._keys[path]).dequantize(torch.float32)
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{self._name} holds values that are not finite in the weight of {path}")
        if weight.shape != (layer.out_features, layer.in_features):
            raise CheckpointError(
                f"{self._name} is another model: {path} is {weight.shape[0]}×{weight.shape[1]} there and "
                f"{layer.out_features}×{layer.in_features} here"
            )
        return weight


def _subtracted(original_OI: Tensor, base: BaseWeight) -> Tensor:
    error_OI = original_OI.clone()
    for rows, tile in base.tiles(torch.float32):
        error_OI[rows] -= tile
    return error_OI


def _take_over(layer: DoRALinear, error_OI: Tensor) -> None:
    """A and B from the largest singular values; rows of A beyond the matrix's own rank stay as they were drawn."""
    sides = min(error_OI.shape)
    rank = min(layer.rank, sides)
    U, S, V = torch.svd_lowrank(error_OI, q=min(rank + _OVERSAMPLED, sides), niter=_PASSES)
    # Where there is no error, A and B of zeros would have gradients of zeros for good: A stays drawn, B zero.
    found = (S[:rank] > _NO_ERROR * S[0]).nonzero()[:, 0]
    root = (S[found] / layer.scaling).sqrt()
    layer.lora_A[found] = (V[:, found] * root).t().to(layer.lora_A.dtype)
    layer.lora_B[:, found] = (U[:, found] * root).to(layer.lora_B.dtype)
    if layer.magnitude_offset is not None:
        layer.magnitude_offset.copy_(layer.weight_norm() - layer.base_norm())
