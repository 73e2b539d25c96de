"""The adapted product and its gradients: y = c ⊙ (x·Wᵀ + s·(z·Aᵀ)·Bᵀ), where z is x, or x thinned out by dropout.

Three autograd nodes rather than one, cut where memory and time are:

    _LowRank     h = z·Aᵀ                         keeps z and h, for dA and dB
    _Product     y = x·Ŵᵀ + h·(s·c⊙B)ᵀ            keeps nothing; Ŵ = c ⊙ W comes out of the base weight tile by tile
    _Magnitude   y                                keeps y, for dm = Σₜ g⊙y / (c·‖V‖)

Gradient checkpointing forgets what a decoder layer keeps, and runs the layer again in the backward, until the last
tensor that was kept has been made again (`early_stop` of `torch.utils.checkpoint`). What nothing waits for is then
never computed: if the last linear of a layer keeps what it needs *before* its product, its product is not done twice.
With LoRA that is one of the seven products of a Llama layer's recompute, and a fifth of its arithmetic. With DoRA the
gradient of the magnitude needs that product, y, unless it was held since the forward (`hold_output`): T × O values a
layer, against its second computation.

The magnitude is a node of its own so that y, which no one else keeps, is freed before the product's backward allocates
dx. The gradient g reaches the first node, which needs it for dB, as the gradient of `carrier`, a (T, O) tensor of one
zero in memory.

The rejected alternatives. One node for all: kept tensors are packed when the node's forward ends, product included.
Leaving the low-rank part of dx to the first node: autograd would add two dx, a third T × I tensor at the peak.

Shape suffixes: T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora.base import BaseWeight
from qdora.errors import ConfigError
from qdora.workspace import workspace_of

__all__ = ["RowScale", "adapted_product", "frozen_product"]


class RowScale(NamedTuple):
    """c and what turns Σₜ g⊙y into the gradient of the magnitude, both (O,) fp32."""

    scale: Tensor
    """c = m/‖V‖."""
    per_output: Tensor
    """1 / (c·‖V‖), or 0 where ‖V‖ is 0."""


def adapted_product(
    x_TI: Tensor,
    z_TI: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    offset_O: Tensor | None,
    base: BaseWeight,
    row_scale: RowScale | None,
    scaling: float,
    hold_output: bool,
) -> Tensor:
    """y, (T, O) in x's dtype, with gradients for x, z, A, B and the magnitude's offset.

    Args:
        z_TI: x thinned out by dropout; None if it is x itself, so that one gradient is made and none added.
        row_scale: None makes c = 1, and leaves the magnitude out: LoRA.
        hold_output: keep y from the forward on, where a checkpoint would forget it and compute it again.
    """
    c_O = None if row_scale is None else row_scale.scale
    # x's gradient is the product's to make: the low-rank node has a part in it only through a z of its own.
    h_TR, carrier_TO = _LowRank.apply(x_TI.detach() if z_TI is None else z_TI, A_RI, B_OR, c_O, scaling)
    y_TO = _Product.apply(x_TI, h_TR, carrier_TO, A_RI.detach(), B_OR.detach(), base, c_O, scaling, z_TI is not None)
    if row_scale is None or offset_O is None or not (torch.is_grad_enabled() and offset_O.requires_grad):
        return y_TO
    y_TO = _Magnitude.apply(y_TO, offset_O, row_scale.per_output, hold_output)
    y_TO.grad_fn.version = y_TO._version
    return y_TO


def frozen_product(x_TI: Tensor, base: BaseWeight) -> Tensor:
    """x·Wᵀ, (T, O), with the gradient for x."""
    return _FrozenProduct.apply(x_TI, base)


class _LowRank(torch.autograd.Function):
    """h = z·Aᵀ, with gradients for z, A and B; and the carrier of y's gradient."""

    @staticmethod
    def forward(
        ctx: Any, z_TI: Tensor, A_RI: Tensor, B_OR: Tensor, c_O: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        h_TR = z_TI @ A_RI.t().to(z_TI.dtype)
        _, needs_A, needs_B = ctx.needs_input_grad[:3]
        ctx.save_for_backward(z_TI if needs_A else None, h_TR if needs_B else None, A_RI, B_OR)
        ctx.c_O, ctx.scaling = c_O, scaling
        return h_TR, h_TR.new_zeros(()).expand(h_TR.shape[0], B_OR.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TR: Tensor, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        z_TI, h_TR, A_RI, B_OR = ctx.saved_tensors
        needs_z, needs_A, needs_B = ctx.needs_input_grad[:3]
        dz_TI = dh_TR @ A_RI.to(dh_TR.dtype) if needs_z else None
        dA_RI = (dh_TR.t() @ z_TI).to(A_RI.dtype) if needs_A else None
        dB_OR = _scaled(g_TO.t() @ h_TR, ctx.c_O, ctx.scaling).to(B_OR.dtype) if needs_B else None
        return dz_TI, dA_RI, dB_OR, None, None


class _Product(torch.autograd.Function):
    """y = x·Ŵᵀ + h·(s·c⊙B)ᵀ, with gradients for x, by way of z too where z is x, and h. Without c it is 1 (LoRA)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        h_TR: Tensor,
        carrier_TO: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        base: BaseWeight,
        c_O: Tensor | None,
        scaling: float,
        thinned: bool,
    ) -> Tensor:
        y_TO = base.linear(x_TI, c_O)
        y_TO.addmm_(h_TR, _scaled(B_OR, c_O, scaling).to(h_TR.dtype).t())
        ctx.A_RI, ctx.B_OR, ctx.base, ctx.c_O, ctx.scaling, ctx.thinned = A_RI, B_OR, base, c_O, scaling, thinned
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        dh_TR = g_TO @ _scaled(ctx.B_OR, ctx.c_O, ctx.scaling).to(g_TO.dtype)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = ctx.base.linear_transposed(g_TO, ctx.c_O)
            if not ctx.thinned:
                dx_TI.addmm_(dh_TR, ctx.A_RI.to(dh_TR.dtype))
        return dx_TI, dh_TR, g_TO, None, None, None, None, None, None


class _Magnitude(torch.autograd.Function):
    """y as it is, with the gradient for the magnitude's offset.

    torch notices when a tensor that was kept has been changed in place, but not through a checkpoint, nor when it is
    held: then the gradient would be wrong in silence. So the version of y is compared here. The recompute makes y by
    the same operations, hence with the same version; a copy, such as one that waited on the host, begins at 0.
    """

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, offset_O: Tensor, per_output_O: Tensor, hold_output: bool) -> Tensor:
        ctx.mark_dirty(y_TO)  # the very tensor, not a view of it, which the model could not change in place
        ctx.holds, ctx.held = hold_output, y_TO.detach() if hold_output else None
        if not hold_output:
            ctx.save_for_backward(y_TO)
        ctx.per_output_O, ctx.dtype = per_output_O, offset_O.dtype
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_TO, ctx.held = ctx.held if ctx.holds else ctx.saved_tensors[0], None
        if y_TO is None:
            raise RuntimeError("a second backward through a linear that holds its output; leave hold_output out")
        if y_TO._version > ctx.version:
            raise ConfigError(
                "the model changes the output of an adapted linear in place, so that its magnitude has no gradient; "
                + ("leave --hold_outputs out" if ctx.holds else "leave that linear out of the targets, or train LoRA")
            )
        return g_TO, (_column_dots(g_TO, y_TO) * ctx.per_output_O).to(ctx.dtype), None, None


class _FrozenProduct(torch.autograd.Function):
    """y = x·Wᵀ, with the gradient for x."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, base: BaseWeight) -> Tensor:
        ctx.base = base
        return base.linear(x_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor, None]:
        return ctx.base.linear_transposed(g_TO), None


def _scaled(M_OR: Tensor, c_O: Tensor | None, scaling: float) -> Tensor:
    """s·c ⊙ M, in fp32."""
    scaled = M_OR.float() * scaling
    return scaled if c_O is None else scaled.mul_(c_O[:, None])


def _column_dots(a_TO: Tensor, b_TO: Tensor) -> Tensor:
    """Σₜ a ⊙ b for each column, (O,) fp32, a few rows at a time so that no whole product exists.

    bf16 factors are multiplied in bf16, which rounds each product as much as its factors were; fp16 would overflow.
    """
    dtype = torch.float32 if a_TO.dtype == torch.float16 else a_TO.dtype
    rows = max(1, workspace_of(a_TO.device).reduce_bytes // (dtype.itemsize * a_TO.shape[1]))
    total_O = torch.zeros(a_TO.shape[1], dtype=torch.float32, device=a_TO.device)
    for a, b in zip(a_TO.split(rows), b_TO.split(rows), strict=True):
        total_O += (a.to(dtype) * b).sum(dim=0)
    return total_O
