"""What training changed in a linear, in magnitude and in direction, as DoRA's paper measures it.

DoRA, arXiv 2402.09353, section 3.2, takes a weight apart into the norm of each row and its direction, and compares them
before (W) and after (V = W + s·B·A; the magnitude m is the trained one, or ‖V‖ for LoRA):

    ΔM = mean over outputs of |m − ‖W‖|            ΔD = mean over outputs of 1 − cos(V, W)

and finds that LoRA changes both together (a positive correlation), while full fine-tuning and DoRA can change one
without the other (a slightly negative one).

The constraint: a short training turns a row by 1e-4 and less, where 1 − cos is 1e-9, and a cosine in fp32 is 1 to
within 1e-7. So nothing here subtracts two large numbers that are nearly equal, and B·A is never built. With Aᵀ = Q·R, Q
an orthonormal basis of A's rows, the change of a row is ΔV = d·Qᵀ with d = s·b·Rᵀ, a vector of `rank` values, and all
that is needed of W is its norm and u = w·Q/‖w‖, one pass over its tiles:

    along = ΔV·w/‖w‖ = d·u                         the part of ΔV that lengthens the row
    turn² = ‖d − along·u‖² + along²·(1 − ‖u‖²)     the part that turns it, two squares: in Q's space, and off it
    ‖V‖²  = (‖w‖ + along)² + turn²
    1 − cos = turn² / (‖V‖·(‖V‖ + ‖w‖ + along))    where ‖w‖ + along ≥ 0; otherwise as it is defined
    ‖V‖ − ‖W‖ = (2·along·‖w‖ + along² + turn²) / (‖V‖ + ‖W‖)

The rejected alternative, ‖ΔV‖² − (ΔV·w)²/‖w‖² with ‖ΔV‖² from A·Aᵀ, is as cheap, but subtracts where a row only grows,
and squares the condition of A. All of it is fp64.

Rows of zeros have no direction: they are left out of ΔD's mean, and count in ΔM's.

Shape suffixes: I in_features, O out_features, R rank (or in_features, if that is less).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdora.adapterfile import LinearAdapter
from qdora.base import BaseWeight
from qdora.errors import NumericsError

__all__ = [
    "LinearChange",
    "RowChange",
    "by_kind",
    "change_of",
    "correlation",
    "correlations",
    "kinds_of",
    "layer_of",
    "row_changes",
]

# A magnitude is stored as fp32, next to a norm that was summed in fp32, on another device perhaps: both are off by a
# few times 2⁻²⁴. Other tools round a magnitude to the dtype they compute in.
_FP32_ROUNDING = 2.0**-20
_ROUNDING_OF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Values closer together than this, relative to their size, have no spread to correlate.
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class RowChange:
    """How each output of a linear changed; (out_features,) fp64 each."""

    norm: Tensor
    """‖W‖, the magnitude that training began with."""
    magnitude: Tensor
    """m − ‖W‖, or ‖V‖ − ‖W‖ for LoRA."""
    direction: Tensor
    """1 − cos(V, W), from 0 to 2; 0 where W is zero, 1 where only V is."""
    turned: Tensor
    """Bool: s·B·A is not zero."""


@dataclass(frozen=True)
class LinearChange:
    """How one linear changed."""

    path: str
    kind: str
    """What it is called in every layer (`q_proj`)."""
    layer: int | None
    rank: int
    outputs: int
    base_norm: float
    """The mean of ‖W‖ over the outputs."""
    delta_m: float
    """ΔM: the mean over the outputs of |m − ‖W‖|."""
    relative_delta_m: float | None
    """ΔM / base_norm; None if the base weight is all zeros."""
    delta_d: float
    """ΔD: the mean over the outputs of 1 − cos(V, W)."""
    magnitudes_moved: int
    """Outputs whose magnitude is another than ‖W‖, by more than the rounding with which it was stored."""
    directions_moved: int
    """Outputs whose s·B·A is not zero."""

    @property
    def moved(self) -> bool:
        """Whether training changed anything in this linear."""
        return self.magnitudes_moved > 0 or self.directions_moved > 0


@torch.no_grad()
def row_changes(weight: BaseWeight, adapter: LinearAdapter) -> RowChange:
    """Compare each row of a linear before and after, in fp64, a tile of the base weight at a time.

    Args:
        weight: (O, I), on the adapter's device.
    """
    Q_IR, R_RR = torch.linalg.qr(adapter.A.double().t())
    d_OR = adapter.scaling * adapter.B.double() @ R_RR.t()
    norm_O = d_OR.new_zeros(weight.out_features)
    u_OR = torch.zeros_like(d_OR)
    for rows, tile in weight.tiles(torch.float32):
        W_OI = tile.double()
        norm_O[rows] = W_OI.norm(dim=1)
        u_OR[rows] = _over(W_OI @ Q_IR, norm_O[rows, None])
    along_O = (d_OR * u_OR).sum(dim=1)
    in_space_O = (d_OR - along_O[:, None] * u_OR).square().sum(dim=1)
    turn2_O = in_space_O + along_O.square() * (1 - u_OR.square().sum(dim=1)).clamp(min=0)
    length_O = norm_O + along_O
    new_norm_O = torch.hypot(length_O, turn2_O.sqrt())
    direction_O = torch.where(
        length_O >= 0, _over(turn2_O, new_norm_O * (new_norm_O + length_O)), 1 - _over(length_O, new_norm_O)
    )
    direction_O = torch.where(new_norm_O > 0, direction_O, 1.0).masked_fill(norm_O == 0, 0)
    if adapter.magnitude is None:
        magnitude_O = _over(2 * along_O * norm_O + along_O.square() + turn2_O, new_norm_O + norm_O)
    else:
        magnitude_O = adapter.magnitude.double() - norm_O
    return RowChange(norm_O, magnitude_O, direction_O, (d_OR != 0).any(dim=1))


def change_of(path: str, kind: str, weight: BaseWeight, adapter: LinearAdapter) -> LinearChange:
    """How one linear changed.

    Args:
        path: of the linear in the model.
        kind: from `kinds_of`.

    Raises:
        CheckpointError: the adapter is for a linear of another shape.
        NumericsError: the base weight is not finite, or the update is not finite in fp64.
    """
    adapter.check_shape(path, weight.out_features, weight.in_features, None)
    rows = row_changes(weight, adapter)
    if not (torch.isfinite(rows.norm).all() and torch.isfinite(rows.magnitude + rows.direction).all()):
        raise NumericsError(f"{path} has values that are not finite; the base or the adapter is damaged")
    has_direction = rows.norm > 0
    base_norm, delta_m = float(rows.norm.mean()), float(rows.magnitude.abs().mean())
    return LinearChange(
        path=path,
        kind=kind,
        layer=layer_of(path),
        rank=adapter.A.shape[0],
        outputs=weight.out_features,
        base_norm=base_norm,
        delta_m=delta_m,
        relative_delta_m=delta_m / base_norm if base_norm else None,
        delta_d=float(rows.direction.sum() / has_direction.sum().clamp(min=1)),
        magnitudes_moved=_count_moved(rows, adapter.magnitude),
        directions_moved=int(rows.turned.sum()),
    )


def _count_moved(rows: RowChange, magnitude: Tensor | None) -> int:
    """LoRA stores no magnitude, so no rounding is to be forgiven."""
    rounding = 0.0 if magnitude is None else _rounding(magnitude)
    return int((rows.magnitude.abs() > rounding * rows.norm).sum())


def _rounding(magnitude: Tensor) -> float:
    """How far, relatively, storing may have moved a magnitude: by the coarsest dtype that holds all of them."""
    fits = [rounding for dtype, rounding in _ROUNDING_OF.items() if torch.equal(magnitude.to(dtype).float(), magnitude)]
    return max(fits, default=_FP32_ROUNDING)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def kinds_of(paths: Sequence[str]) -> dict[str, str]:
    """What each linear is called in every layer: the last part of its path, or as many as tell the kinds apart.

    `model.layers.3.self_attn.q_proj` is `q_proj`; GPT-2's two `c_proj` are `attn.c_proj` and `mlp.c_proj`.
    """
    tails = {path: _tail(path) for path in paths}
    of_last_part: dict[str, set[str]] = {}
    for tail in tails.values():
        of_last_part.setdefault(tail.rpartition(".")[2], set()).add(tail)
    return {
        path: tail if len(of_last_part[last := tail.rpartition(".")[2]]) > 1 else last for path, tail in tails.items()
    }


def _tail(path: str) -> str:
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    after = parts[numbers[0] + 1 :] if numbers else parts
    return ".".join(part for part in after if not part.isdecimal())


def layer_of(path: str) -> int | None:
    """The number of the layer that a linear is in: the first number in its path."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def correlation(changes: Sequence[LinearChange]) -> float | None:
    """Pearson's correlation of ΔM and ΔD over linears; None for fewer than three, or where one of them is constant.

    Where no magnitude moved, or no direction, there is only rounding to correlate with: None too.
    """
    if len(changes) < 3 or not any(c.magnitudes_moved for c in changes) or not any(c.directions_moved for c in changes):
        return None
    x = torch.tensor([change.delta_m for change in changes], dtype=torch.float64)
    y = torch.tensor([change.delta_d for change in changes], dtype=torch.float64)
    spreads = []
    for values in (x, y):
        largest = float(values.abs().max())
        if largest == 0 or float(values.max() - values.min()) <= _NO_SPREAD * largest:
            return None
        spreads.append(values / largest - (values / largest).mean())
    value = float(torch.dot(*spreads) / (spreads[0].norm() * spreads[1].norm()))
    return max(-1.0, min(1.0, value))


def correlations(changes: Sequence[LinearChange]) -> dict[str, float | None]:
    """`correlation` within each kind of module."""
    return {kind: correlation(members) for kind, members in by_kind(changes).items()}


def by_kind(changes: Sequence[LinearChange]) -> dict[str, list[LinearChange]]:
    """The linears of each kind, in the order in which the kinds first come."""
    members: dict[str, list[LinearChange]] = {}
    for change in changes:
        members.setdefault(change.kind, []).append(change)
    return members
