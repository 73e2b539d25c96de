"""The RMS norm of most decoders, with a backward that keeps its input and one number a token.

    y = w ⊙ x / √(mean(x²) + ε)

The idea. transformers writes this norm as six operations in fp32, and autograd keeps what they wait for: x in fp32, 4
bytes a value, for each of a layer's norms while the layer is in its backward. The gradient can be had from x as it
came, which the residual stream or the checkpoint keeps anyway, and from 1/√(…), a number a token:

    dx = (g⊙w − x̂ · mean(g⊙w⊙x̂)) / √(mean(x²) + ε),  x̂ = x / √(mean(x²) + ε)

The constraint. A model must compute what it computes in plain transformers, to the bit. So the forward is theirs, one
operation after the other, and a module is taken for such a norm by what it answers: alone with random weights, in bf16,
it must give the same bits. Others (Gemma multiplies by 1 + w, in fp32) stay as they are.

The rejected alternative: torch's own `rms_norm`, which rounds once where transformers rounds twice.

Shape suffixes: T tokens, H hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qdora.origin import check_unchanged, note_origin, version_of
from qdora.trial import same_bits, takes_one_input, with_parts
from qdora.workspace import blocks

__all__ = ["RMSNorm", "replace_norms"]


class RMSNorm(nn.Module):
    """y = w ⊙ x / √(mean(x²) + ε) over the last dimension, in the dtype of w and x; differentiable in both."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, epsilon  # transformers' names

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, epsilon={self.variance_epsilon}"

    def forward(self, x: Tensor) -> Tensor:
        y, inverse_T1 = _Norm.apply(x, self.weight, self.variance_epsilon)
        note_origin(y, x, inverse_T1, self.weight)
        return y


class _Norm(torch.autograd.Function):
    """See the top of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, dtype=torch.promote_types(weight.dtype, x.dtype), memory_format=torch.contiguous_format)
        x_TH, y_TH = _matrix(x), _matrix(y)
        inverse_T1 = x.new_empty(len(x_TH), 1, dtype=torch.float32)
        for rows in blocks(x_TH):
            wide = x_TH[rows].float()
            inverse = inverse_T1[rows] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            torch.mul(weight, (wide * inverse).to(x.dtype), out=y_TH[rows])
        ctx.save_for_backward(x, inverse_T1, weight)
        ctx.version = version_of(x)
        ctx.mark_non_differentiable(inverse_T1)
        return y, inverse_T1  # y is no view, which nobody might change in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, inverse_T1, weight = ctx.saved_tensors
        check_unchanged(x, ctx.version)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        x_TH, g_TH, dx_TH = _matrix(x), _matrix(g), None if dx is None else _matrix(dx)
        dweight_H = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        weight_H = weight.float()
        for rows in blocks(x_TH):
            normed = x_TH[rows] * inverse_T1[rows]
            if dweight_H is not None:
                dweight_H += (g_TH[rows] * normed).sum(0)
            if dx_TH is not None:
                pull = g_TH[rows] * weight_H
                along = (pull * normed).mean(-1, keepdim=True)
                dx_TH[rows] = pull.addcmul_(normed, along, value=-1).mul_(inverse_T1[rows])
        return dx, None if dweight_H is None else dweight_H.to(weight.dtype), None


def _matrix(tensor: Tensor) -> Tensor:
    """(..., H) as (T, H)."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def replace_norms(model: nn.Module) -> None:
    """Put an `RMSNorm` in the place of each module that computes the same, with its weight, in place."""
    for path, module in list(model.named_modules()):
        if (epsilon := _epsilon_of(module)) is not None and _answers_alike(module, epsilon):
            model.set_submodule(path, RMSNorm(module.weight, epsilon).train(module.training))


def _epsilon_of(module: nn.Module) -> float | None:
    """Of what may be such a norm: one weight, one ε, one input."""
    parts = [name for name, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_children())]
    if parts != ["weight"] or isinstance(module, RMSNorm) or not takes_one_input(module):
        return None
    found = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
    return next((epsilon for epsilon in found if isinstance(epsilon, float)), None)


def _answers_alike(module: Any, epsilon: float) -> bool:
    if module.weight.dim() != 1:
        return False
    generator = torch.Generator(device="cpu").manual_seed(0)
    size = len(module.weight)
    weight = torch.rand(size, generator=generator, device="cpu").add_(0.5)
    # Long, usual and so short that ε decides.
    lengths = torch.tensor([9.0, 1.0, epsilon**0.5], device="cpu").view(3, 1, 1)
    x = torch.randn(3, 2, size, generator=generator, device="cpu") * lengths
    parameter = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return same_bits(with_parts(module, {"weight": parameter}, {}), RMSNorm(parameter, epsilon), x.bfloat16())
