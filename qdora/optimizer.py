"""AdamW for bf16 parameters that trains as if they were fp32, in two bytes a parameter more than plain bf16 AdamW.

What goes wrong without it. bf16 holds 8 bits of mantissa, so an update below 2⁻⁹ of its parameter is rounded away:
late in a decay, A and B stand still. The second moment is worse off: with β₂ = 0.999 it changes by a thousandth a step,
which is below half of bf16's spacing, so it never falls again after a large gradient, and the steps stay too small.

What is done. All arithmetic is fp32, in buckets. The parameter carries a bf16 compensation: what rounding took from it
(Kahan's term), which makes 16 bits of mantissa of the two. The second moment is rounded stochastically, up or down with
the probability that keeps its mean, so that it drifts as it should. The first moment changes by a tenth a step and may
be rounded as it comes. Memory: 2 + 2 + 2 bytes a parameter beside the parameter itself.

The rejected alternatives: an fp32 copy of each parameter (10 bytes); torch-optimi's AdamW, which compensates the
parameter and not the second moment (500 steps after one large gradient it stood at 3.6 times its value, and torch's own
at 1.6 times); torchao's, which rounds the parameter stochastically, and so shakes it a little at
each step.

The random bits come from torch's generator of the parameter's device, so a seed repeats a run, and a trainer that saves
the generators' states resumes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qdora.errors import ConfigError

__all__ = ["CompensatedAdamW"]

_BUCKET_VALUES = 2**21


class CompensatedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a compensated parameter and fp32 arithmetic.

    Args:
        params: tensors or groups; fp32 ones are updated plainly and need no compensation.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """
        Raises:
            ConfigError: a parameter is neither fp32 nor bf16.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "steps": 0})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ConfigError(f"compensated AdamW trains float32 and bfloat16, found {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            for bucket in _buckets(p for p in group["params"] if p.grad is not None):
                self._update(bucket, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        states = [self._state_of(p) for p in params]
        gradient = _joined(p.grad for p in params)
        mean = _joined(state["exp_avg"] for state in states).lerp_(gradient, 1 - beta1)
        square = _joined(state["exp_avg_sq"] for state in states).mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        value = _joined(params)
        if "compensation" in states[0]:
            value += _joined(state["compensation"] for state in states)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (square / (1 - beta2 ** group["steps"])).sqrt_().add_(group["eps"])
        value.addcdiv_(mean / (1 - beta1 ** group["steps"]), denominator, value=-group["lr"])
        _split_into(mean, [state["exp_avg"] for state in states])
        if "compensation" in states[0]:
            square = _stochastically_rounded(square)
        _split_into(square, [state["exp_avg_sq"] for state in states])
        _split_into(value, params)
        if "compensation" in states[0]:
            _split_into(value - _joined(params), [state["compensation"] for state in states])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            names = ["exp_avg", "exp_avg_sq"]
            if parameter.dtype != torch.float32:
                names.append("compensation")
            state.update({name: torch.zeros_like(parameter) for name in names})
        return state


def _buckets(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype and device, a few million values at a time: few kernels, little fp32 at once."""
    bucket: list[Tensor] = []
    for parameter in params:
        kind = (parameter.dtype, parameter.device)
        full = sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET_VALUES
        if bucket and (full or (bucket[0].dtype, bucket[0].device) != kind):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _joined(tensors: Iterable[Any]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).float()


def _split_into(joined: Tensor, targets: list[Tensor]) -> None:
    parts = joined.split([target.numel() for target in targets])
    torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def _stochastically_rounded(values: Tensor) -> Tensor:
    """fp32 values of which bf16 keeps every bit: each rounded up or down with the probability that keeps its mean.

    A random number below 2¹⁶ is added to the bits that bf16 cuts off; if they overflow, the value is the next one.
    """
    bits = values.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32)
