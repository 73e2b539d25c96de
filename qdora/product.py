"""The adapted product and its gradients: y = c ⊙ (x·Wᵀ + s·(z·Aᵀ)·Bᵀ), where z is x, or x thinned out by dropout.

Two autograd nodes rather than one, cut where memory and time are:

    _Inputs      h = z·Aᵀ                         keeps z (or what it was made of, see `origin`) and h, for dA and dB;
                                                  then makes dx = g·Ŵ + dh·A
    _Product     y = x·Ŵᵀ + h·(s·c⊙B)ᵀ            keeps y, for dm = Σₜ g⊙y / (c·‖V‖); makes dh. Ŵ = c ⊙ W comes out of
                                                  the base weight tile by tile

Gradient checkpointing forgets what a decoder layer keeps, and runs the layer again in the backward, until the last
tensor that was kept has been made again (`early_stop` of `torch.utils.checkpoint`). What nothing waits for is then
never computed: if the last linear of a layer keeps what it needs *before* its product, its product is not done twice.
With LoRA that is one of the seven products of a Llama layer's recompute, and a fifth of its arithmetic. With DoRA the
gradient of the magnitude needs that product, y, unless it was held since the forward (`hold_output`): T × O values a
layer, against its second computation.

The gradient g reaches the first node, which needs it for dB and dx, as the gradient of `carrier`, a (T, O) tensor of
one value in memory that no one reads. Each node is done with what it kept before it makes something as large: y is gone
before dx, and so is z, which a checkpoint gives to nobody else. (Once read, that is; so both are read in functions of
their own.)

The rejected alternatives. One node for all: kept tensors are packed when the node's forward ends, product included.
A third node for the magnitude: a node costs time of its own in forward, recompute and backward (at 4 tokens, the
linears of SmolLM2 take 12 % longer in three nodes than in one). Making dx in the second node, where g comes first:
z, in a decoder's MLP the widest tensor there is, would still be kept beside it.

Shape suffixes: T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.base import BaseWeight
from qdora.errors import ConfigError
from qdora.origin import Origin, check_unchanged, version_of

__all__ = ["Operands", "RowScale", "adapted_product", "column_dots", "frozen_product"]


class RowScale(NamedTuple):
    """What changes only with the adapter: c and its companions, all fp32."""

    scale: Tensor
    """c = m/‖V‖, (O,)."""
    low_rank: Tensor
    """s·c, (O, 1)."""
    per_output: Tensor
    """1 / (c·‖V‖), (O,), or 0 where ‖V‖ is 0: what turns Σₜ g⊙y into the gradient of the magnitude."""


class Operands(NamedTuple):
    """What a product is computed with, as one argument: autograd looks for tensors in the arguments, not in tuples."""

    base: BaseWeight
    A_RI: Tensor
    B_OR: Tensor
    scaling: float
    row_scale: RowScale | None
    """None makes c = 1, and leaves the magnitude out: LoRA."""
    hold_output: bool = False
    """Keep y from the forward on, where a checkpoint would forget it and compute it again."""

    @property
    def scale(self) -> Tensor | None:
        """c, (O,); None is 1."""
        return None if self.row_scale is None else self.row_scale.scale

    @property
    def low_rank_scale(self) -> Tensor | float:
        """s·c, (O, 1), or s."""
        return self.scaling if self.row_scale is None else self.row_scale.low_rank

    def scaled_low_rank(self, dtype: torch.dtype) -> Tensor:
        """s·c ⊙ B, multiplied in fp32 and rounded once."""
        return torch.mul(self.B_OR, self.low_rank_scale, out=torch.empty_like(self.B_OR, dtype=dtype))


def adapted_product(
    x_TI: Tensor, z_TI: Tensor | None, offset_O: Tensor | None, operands: Operands, origin: Origin | None = None
) -> Tensor:
    """y, (T, O) in x's dtype, with gradients for x, z, A, B and the magnitude's offset.

    Args:
        z_TI: x thinned out by dropout; None if it is x itself, so that one gradient is made and none added.
        offset_O: of the magnitude; None for LoRA.
        origin: of x, kept instead of it; not looked at with z_TI.
    """
    h_TR, carrier_TO = _Inputs.apply(x_TI, z_TI, operands.A_RI, operands.B_OR, operands, origin)
    return _Product.apply(x_TI.detach(), h_TR, carrier_TO, offset_O, operands)


def frozen_product(x_TI: Tensor, base: BaseWeight) -> Tensor:
    """x·Wᵀ, (T, O), with the gradient for x."""
    return _FrozenProduct.apply(x_TI, base)


def _in_own_dtypes(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that runs once, in the dtypes of its forward: it may be called within an autocast that began since."""

    @once_differentiable
    @wraps(backward)
    def apart(ctx: Any, *gradients: Tensor) -> Any:
        kind = gradients[-1].device.type
        if not torch.is_autocast_enabled(kind):
            return backward(ctx, *gradients)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *gradients)

    return apart


class _Inputs(torch.autograd.Function):
    """h = z·Aᵀ, and the carrier of y's gradient; with gradients for x (all of it), z, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        z_TI: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        operands: Operands,
        origin: Origin | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.thinned = z_TI is not None
        z_TI = x_TI if z_TI is None else z_TI
        kept: tuple[Tensor, ...] = (z_TI,)
        if origin is not None and not ctx.thinned:
            # The small ones first, for which z cannot pass.
            kept, ctx.values_version = (origin.row, origin.column, origin.values), origin.version
        h_TR = z_TI @ A_RI.t().to(z_TI.dtype)
        _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(h_TR if needs_B else None, *(kept if needs_A else ()))
        ctx.operands, ctx.versions = operands, (version_of(A_RI), version_of(B_OR))
        return h_TR, h_TR.new_empty(()).expand(h_TR.shape[0], B_OR.shape[0])

    @staticmethod
    @_in_own_dtypes
    def backward(ctx: Any, dh_TR: Tensor, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        operands: Operands = ctx.operands
        if ctx.versions != (version_of(operands.A_RI), version_of(operands.B_OR)):
            raise RuntimeError(
                "an adapter was changed in place between a forward and its backward; step after the backward"
            )
        needs_x, needs_z, *_ = ctx.needs_input_grad
        dA_RI, dB_OR = _direction_gradients(ctx, dh_TR, g_TO)
        dx_TI = operands.base.linear_transposed(g_TO, operands.scale) if needs_x else None
        dz_TI = None
        if ctx.thinned:
            dz_TI = dh_TR @ operands.A_RI.to(dh_TR.dtype) if needs_z else None
        elif dx_TI is not None:
            dx_TI.addmm_(dh_TR, operands.A_RI.to(dh_TR.dtype))
        return dx_TI, dz_TI, dA_RI, dB_OR, None, None


def _direction_gradients(ctx: Any, dh_TR: Tensor, g_TO: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dA = dhᵀ·z and dB = s·c ⊙ gᵀ·h, of those that train."""
    h_TR, *kept = ctx.saved_tensors
    operands: Operands = ctx.operands
    dA_RI = _gradient_of_a(ctx, dh_TR, kept).to(operands.A_RI.dtype) if kept else None
    dB_OR = None
    if h_TR is not None:
        dB_OR = (g_TO.t() @ h_TR).mul_(operands.low_rank_scale).to(operands.B_OR.dtype)
    return dA_RI, dB_OR


def _gradient_of_a(ctx: Any, dh_TR: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """dhᵀ·z, (R, I), by z itself or by what it was made of."""
    if len(kept) == 1:
        return dh_TR.t() @ kept[0]
    row_T1, column_I, values_TI = kept
    check_unchanged(values_TI, ctx.values_version)
    return ((dh_TR * row_T1).to(dh_TR.dtype).t() @ values_TI).mul_(column_I)


class _Product(torch.autograd.Function):
    """y = x·Ŵᵀ + h·(s·c⊙B)ᵀ, with gradients for h and the magnitude's offset; x's is for `_Inputs` to make.

    torch notices when a tensor that was kept has been changed in place, but not through a checkpoint, nor when it is
    held: then the gradient would be wrong in silence. So the version of y is compared here. The recompute makes y by
    the same operations, hence with the same version; a copy, such as one that waited on the host, begins at 0.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, h_TR: Tensor, carrier_TO: Tensor, offset_O: Tensor | None, operands: Operands
    ) -> Tensor:
        y_TO = operands.base.linear(x_TI, operands.scale)
        y_TO.addmm_(h_TR, operands.scaled_low_rank(h_TR.dtype).t())
        ctx.operands = operands
        if offset_O is not None and ctx.needs_input_grad[3] and not y_TO.is_inference():
            ctx.version, ctx.dtype = y_TO._version, offset_O.dtype
            ctx.held = y_TO.detach() if operands.hold_output else None
            ctx.save_for_backward(None if operands.hold_output else y_TO)
        return y_TO

    @staticmethod
    @_in_own_dtypes
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        operands: Operands = ctx.operands
        doffset_O = _magnitude_gradient(ctx, g_TO) if ctx.needs_input_grad[3] else None
        dh_TR = g_TO @ operands.scaled_low_rank(g_TO.dtype)
        return None, dh_TR, g_TO, doffset_O, None


def _magnitude_gradient(ctx: Any, g_TO: Tensor) -> Tensor:
    """dδ = Σₜ g⊙y / (c·‖V‖), (O,)."""
    operands: Operands = ctx.operands
    assert operands.row_scale is not None
    if operands.hold_output:
        y_TO, ctx.held = ctx.held, None
    else:
        (y_TO,) = ctx.saved_tensors
    if y_TO is None:
        raise RuntimeError("a second backward through a linear that holds its output; leave hold_output out")
    if y_TO._version > ctx.version:
        raise ConfigError(
            "the model changes the output of an adapted linear in place, so that its magnitude has no gradient; "
            + (
                "leave --hold_outputs out"
                if operands.hold_output
                else "leave that linear out of the targets, or train LoRA"
            )
        )
    return column_dots(g_TO, y_TO, operands.row_scale.per_output).to(ctx.dtype)


class _FrozenProduct(torch.autograd.Function):
    """y = x·Wᵀ, with the gradient for x."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, base: BaseWeight) -> Tensor:
        ctx.base = base
        return base.linear(x_TI)

    @staticmethod
    @_in_own_dtypes
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor, None]:
        return ctx.base.linear_transposed(g_TO), None


def column_dots(g_TO: Tensor, y_TO: Tensor, scale_O: Tensor) -> Tensor:
    """scale ⊙ Σₜ g ⊙ y, (O,) fp32.

    This is the gradient that a batch norm has for its weight, for the mean 0 and the inverse deviation `scale`. torch
    computes it in one pass, summed in fp32; a product and its sum are two, and round T × O products to bf16 in between
    (2e-3 of the result instead of 1e-7).
    """
    if not len(g_TO):
        return torch.zeros_like(scale_O)  # torch would divide by the number of rows, and end the process
    mean_O = torch.zeros_like(scale_O)
    # CUDA's kernel looks at no strides, and has no gradient for a weight that is not there, though it never reads it.
    _, dots_O, _ = torch.ops.aten.native_batch_norm_backward(
        g_TO.contiguous(), y_TO.contiguous(), scale_O, None, None, mean_O, scale_O, True, 0.0, [False, True, False]
    )
    return dots_O
