"""DoRA at the price of LoRA: one linear layer for a frozen base weight and a trained adapter.

    V  = W + s·B·A                 direction: W frozen, s = alpha / rank
    W' = m ⊙ V / ‖V‖               ‖V‖: L2 norm of each row, a constant for the gradient (DoRA, arXiv 2402.09353,
                                   section 4.3); m = ‖W‖ + δ, and δ is what is trained
    y  = x·W'ᵀ + bias              the bias is never scaled

With c = m/‖V‖ this is  y = c ⊙ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ), and what follows rests on three observations.

1. The norm needs no product B·A. ‖V‖² = ‖W‖² + Σₖ (2s·W·Aᵀ + s²·B·(A·Aᵀ))⊙B, row by row: ‖W‖² is computed
   once, at load, and W·Aᵀ is one more pass over the tiles, in the dtype of the forward (its rounding enters the norm
   shrunk by the size of the update: 1e-5 in bf16); the sums are fp32.
2. It changes only when the adapter does: once an optimizer step, not for each micro-batch, and not again in the
   recompute under gradient checkpointing. Tensor versions alone cannot tell when that is (fused AdamW and all of
   bitsandbytes' optimizers leave them untouched: a peer trains on a norm that is 7 to 9 % off after 20 steps), so
   torch's hook that runs after every optimizer's step counts, and versions catch the rest: `copy_`,
   `load_state_dict`, in-place edits. A write through `.data` between steps escapes both; call `refresh` after one.
   Under FSDP2 the parameters that the forward sees are gathered ones, which live on from step to step and whose
   versions stand still; what is edited is this process's shards, so their versions count too (`watch`).
3. Magnitude needs only the output. dm = Σₜ g ⊙ (x·Vᵀ)/‖V‖ = Σₜ (g ⊙ y)/(c·‖V‖), so no second product is kept.

Rows of zeros. ‖V‖ = 0 gives c = 1 (whatever c is, the output is 0), no gradient for δ and the plain LoRA gradient for
B, so that such a row can learn. m = 0 would make observation 3 divide zero by zero: |c| is kept at 2⁻⁶⁰ or above,
which is nothing beside any rounding and leaves the gradient exact.

Why δ and not m: bf16 is spaced 2⁻⁸ near 1, so a bf16 magnitude rounds every Adam step of 1e-4 away (measured: 0.0 %
of them moved in 80 steps). δ starts at zero, where bf16 is fine; and c is then exactly 1, so that a fresh adapter
changes no bit of the output.

`torch.compile` steps around the layer (a graph break before and after): traced, c would be guarded by the number of
optimizer steps and compiled anew after each, and nothing is left to fuse where the tiles' products take the time.

Linears that share an input (q, k, v; gate, up) do not share a pass over it: x·Aᵀ takes 0.3 ms of the 330 that a
4096 × 11008 linear takes for 1,024 tokens, forward, recompute and gradient.

Dropout, if any, is on the input of the low-rank path only, so that x·Wᵀ is never thinned out.

Shape suffixes: T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdora.base import BaseWeight, KeepsDtype
from qdora.origin import origin_of, version_of
from qdora.product import Operands, RowScale, adapted_product, frozen_product

__all__ = ["DoRALinear", "FrozenLinear", "count_step", "merge_rows"]

_SMALLEST_SCALE = 2.0**-60
# An output times that is no longer a number of fp16's; this still is, with some bits left.
_SMALLEST_SCALE_IN_FP16 = 2.0**-12

_optimizer_steps = 0


def count_step(*_: Any) -> None:
    """Note that what trains has changed: called after every optimizer's step."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(count_step)


def merge_rows(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, magnitude_O: Tensor | None, scaling: float) -> Tensor:
    """W' for some rows of a linear, (O, I) fp32; the norm is taken of the dense V. Without a magnitude, V (LoRA).

    A row of V that is zero stays zero.
    """
    V_OI = torch.addmm(W_OI.float(), B_OR.float(), A_RI.float(), alpha=scaling)
    if magnitude_O is None:
        return V_OI
    norm_O = V_OI.norm(dim=1)
    return V_OI * torch.where(norm_O > 0, magnitude_O / norm_O, 1.0)[:, None]


class FrozenLinear(nn.Module):
    """y = x·Wᵀ + bias over a frozen base weight, differentiable in x: a quantized linear without an adapter."""

    def __init__(self, base: BaseWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.base = base
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return _in_own_dtype(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        y_TO = frozen_product(x.reshape(-1, self.in_features), self.base)
        return _with_bias(y_TO, self.bias).view(*x.shape[:-1], self.out_features)


class DoRALinear(nn.Module):
    """A frozen linear with a trained low-rank direction and, with `use_dora`, a trained magnitude.

    Args:
        base: the frozen weight, NF4 or dense.
        rank, scaling: of the direction update s·B·A.
        bias: (O,), frozen and never scaled.
        use_dora: False leaves the magnitude out: LoRA.
        dropout: on the input of the low-rank path, in training.
        dtype: of A, B and the magnitude offset.

    Takes and returns (..., in_features) → (..., out_features) in the dtype of the input, or of autocast.
    """

    hold_output = False
    """Keep y from the forward on for the gradient of the magnitude, T × O values, where gradient checkpointing would
    compute it again for that alone. Only `holding` knows where that is; not to be changed between a forward and its
    backward, and good for one backward."""

    def __init__(
        self,
        base: BaseWeight,
        rank: int,
        scaling: float,
        bias: Tensor | None = None,
        use_dora: bool = True,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.base = base
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.scaling, self.use_dora = rank, scaling, use_dora
        self.enabled = True
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=base.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=base.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude_offset: nn.Parameter | None = None
        if use_dora:
            self.magnitude_offset = nn.Parameter(torch.zeros(base.out_features, dtype=dtype, device=base.device))
            self._base_norm = _Constant(base.row_norms_squared().sqrt())
        self._row_scale: tuple[Any, RowScale, Any] | None = None
        self._watched: tuple[Tensor, ...] = ()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, use_dora={self.use_dora}"

    def forward(self, x: Tensor) -> Tensor:
        return _in_own_dtype(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, self.in_features)
        if self.enabled:
            z_TI = self.dropout(x_TI) if self.training and self.dropout.p > 0 else None
            row_scale = self.row_scale(x.dtype)
            operands = Operands(self.base, self.lora_A, self.lora_B, self.scaling, row_scale, self.hold_output)
            y_TO = adapted_product(x_TI, z_TI, self.magnitude_offset, operands, origin_of(x))
        else:
            y_TO = frozen_product(x_TI, self.base)
        return _with_bias(y_TO, self.bias).view(*x.shape[:-1], self.out_features)

    def row_scale(self, dtype: torch.dtype = torch.float32) -> RowScale | None:
        """c and its companions for the adapter as it is now, computed at most once an optimizer step; None for LoRA.

        Args:
            dtype: of the forward, see `weight_norm`.
        """
        if self.magnitude_offset is None:
            return None
        looked_at = (self.lora_A, self.lora_B, self.magnitude_offset, *self._watched)
        versions = [version_of(p) for p in looked_at]
        if None in versions:
            return self._compute_row_scale(dtype)  # of inference tensors nothing tells whether they were edited
        storages = [p.untyped_storage() for p in looked_at]
        places = [(storage._cdata, p.storage_offset()) for storage, p in zip(storages, looked_at, strict=True)]
        state = (dtype, _optimizer_steps, places, versions)
        if self._row_scale is None or self._row_scale[0] != state:
            # The storages are kept, lest others come to lie in their places: parameters may be swapped for a call.
            self._row_scale = state, self._compute_row_scale(dtype), storages
        return self._row_scale[1]

    def watch(self, shards: Sequence[Tensor]) -> None:
        """Compute the row scale anew when these tensors were edited too: this process's shards of what trains."""
        self._watched = tuple(shards)

    def refresh(self) -> None:
        """Forget the row scale. Needed only after the adapter was written to through `.data`."""
        self._row_scale = None

    @torch.no_grad()
    def _compute_row_scale(self, dtype: torch.dtype) -> RowScale:
        norm_O = self.weight_norm(dtype)
        is_zero_O = norm_O == 0
        scale_O = (self.magnitude() / norm_O).masked_fill_(is_zero_O, 1)
        smallest = _SMALLEST_SCALE_IN_FP16 if dtype == torch.float16 else _SMALLEST_SCALE
        scale_O.masked_fill_(scale_O.abs() < smallest, smallest)
        return RowScale(
            scale_O, (scale_O * self.scaling)[:, None], (scale_O * norm_O).reciprocal_().masked_fill_(is_zero_O, 0)
        )

    @torch.no_grad()
    def weight_norm(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """‖V‖ of each row for the adapter as it is now, (O,) fp32, by the factored formula.

        Args:
            dtype: of the product W·Aᵀ; everything else is fp32.
        """
        s, A_RI, B_OR = self.scaling, self.lora_A.float(), self.lora_B.float()
        with torch.autocast(A_RI.device.type, enabled=False):
            At_IR = self.lora_A.to(dtype).t()
            parts = [tile_OI @ At_IR for _, tile_OI in self.base.tiles(dtype)]
            WAt_OR = parts[0] if len(parts) == 1 else torch.cat(parts)
            change_OR = torch.addmm(WAt_OR.float(), B_OR, A_RI @ A_RI.t(), beta=2 * s, alpha=s**2).mul_(B_OR)
        base_norm_O = self.base_norm()
        return change_OR.sum(dim=1).addcmul_(base_norm_O, base_norm_O).clamp_(min=0).sqrt_()

    def base_norm(self) -> Tensor:
        """‖W‖ of each row, (O,) fp32: the magnitude that a fresh adapter has."""
        return self._base_norm.value

    @torch.no_grad()
    def magnitude(self) -> Tensor:
        """m = ‖W‖ + δ, (O,) fp32."""
        assert self.magnitude_offset is not None
        return self.base_norm() + self.magnitude_offset

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' whole, (O, I). For tests and small models; `qdora.merge` does the same from files, shard by shard."""
        magnitude = None if self.magnitude_offset is None else self.magnitude()
        W = self.base.dequantize(torch.float32)
        return merge_rows(W, self.lora_A, self.lora_B, magnitude, self.scaling).to(dtype)


class _Constant(KeepsDtype):
    """A tensor that belongs to no checkpoint and moves with its model."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)


def _in_own_dtype(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Decide by hand what autocast would, and switch it off inside; and step around `torch.compile`.

    The arithmetic chooses its dtypes with care (fp32 norms above all); autocast would override them.
    """
    if torch.compiler.is_compiling():
        return _uncompiled(compute, x)
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return compute(x)
    with torch.autocast(kind, enabled=False):
        return compute(x.to(torch.get_autocast_dtype(kind)))


@torch.compiler.disable
def _uncompiled(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _in_own_dtype(compute, x)


def _with_bias(y_TO: Tensor, bias_O: Tensor | None) -> Tensor:
    return y_TO if bias_O is None else y_TO + bias_O.to(y_TO.dtype)
