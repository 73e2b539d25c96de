"""AdamW for bf16 parameters that trains as if they were fp32, in two bytes a parameter more than plain bf16 AdamW.

What goes wrong without it. bf16 holds 8 bits of mantissa, so an update below 2⁻⁹ of its parameter is rounded away:
late in a decay, A and B stand still. The second moment is worse off: with β₂ = 0.999 it changes by a thousandth a step,
which is below half of bf16's spacing, so it never falls again after a large gradient, and the steps stay too small.

What is done. All arithmetic is fp32, a bucket of parameters or a slice of a large one at a time. The parameter carries
a bf16 compensation: what rounding took from it (Kahan's term), which makes 16 bits of mantissa of the two. The second
moment is rounded stochastically, up or down with the probability that keeps its mean, so that it drifts as it should.
The first moment changes by a tenth a step and may be rounded as it comes. Memory: 2 + 2 + 2 bytes a parameter beside
the parameter itself, and during the step 32 bytes for each of the two million values of a bucket.

The rejected alternatives: an fp32 copy of each parameter (10 bytes); torch-optimi's AdamW, which compensates the
parameter and not the second moment (500 steps after one large gradient it stood at 3.6 times its value, and torch's own
at 1.6 times); torchao's, which rounds the parameter stochastically, and so shakes it a little at
each step.

The random bits come from the seed and the number of the step, and from nothing else that happens: a seed repeats a
run, a resumed run goes on to the same bits, and processes that each hold all of the parameters (DDP) round them alike,
though dropout has drawn other numbers in each. A process that holds shards (FSDP2) updates those, with bits of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qdora.distributed import local, spread_like, whole
from qdora.errors import ConfigError

__all__ = ["CompensatedAdamW", "buckets"]

_BUCKET_VALUES = 2**21
_Parts = dict[str, list[Tensor]]
"""By name (parameter, gradient, exp_avg, …), that of each parameter; shards, where they are sharded."""


class CompensatedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a compensated parameter and fp32 arithmetic.

    Args:
        params: tensors or groups; fp32 ones are updated plainly and need no compensation.
            Of those that FSDP2 sharded, each process updates its shard, and its state is sharded likewise.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.

    The seed of the stochastic rounding is torch's when the optimizer is made.
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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "steps": 0}
        super().__init__(params, {**defaults, "seed": torch.initial_seed()})
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
            moving = [p for p in group["params"] if p.grad is not None]
            group["steps"] += bool(moving)  # a step that was left out is none, to the moments' corrections either
            for number, bucket in enumerate(buckets(moving)):
                for start, parts in _slices(self._tensors_of(bucket)):
                    sharded = isinstance(bucket[0], DTensor)
                    _update(parts, group, _random_bits(group, number, start, sharded))
        return loss

    def whole_state_dict(self) -> dict[str, Any]:
        """`state_dict` on the CPU with nothing sharded, as one process would have it; every process must join in."""
        found = self.state_dict()
        state = {
            index: {name: whole(value).cpu() if isinstance(value, Tensor) else value for name, value in entries.items()}
            for index, entries in found["state"].items()
        }
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, sharded or whole, whatever number of processes it was saved by, and in whatever dtype.

        Raises:
            ValueError: it is of other parameters or of another optimizer.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        _check_state(state_dict, self.param_groups, params)
        state = {
            index: {
                name: spread_like(value, params[index]) if isinstance(value, Tensor) else value
                for name, value in entries.items()
            }
            for index, entries in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})
        for parameter, entries in self.state.items():
            if parameter.dtype == torch.float32:
                entries.pop("compensation", None)  # less than half of what bf16 tells apart
            else:
                entries.setdefault("compensation", torch.zeros_like(parameter))

    def _tensors_of(self, bucket: list[Tensor]) -> _Parts:
        states = [{name: local(value) for name, value in self._state_of(p).items()} for p in bucket]
        named = {name: [state[name] for state in states] for name in states[0]}
        gradients = [local(p.grad) for p in bucket if p.grad is not None]
        return {**named, "parameter": [local(p) for p in bucket], "gradient": gradients}

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            names = ["exp_avg", "exp_avg_sq"]
            if parameter.dtype != torch.float32:
                names.append("compensation")
            state.update({name: torch.zeros_like(parameter) for name in names})
        return state


def _slices(parts: _Parts) -> Iterator[tuple[int, _Parts]]:
    """What is computed at once, and where it begins: all, or of one large tensor (a head) as much as fits a bucket."""
    count, contiguous = len(parts["parameter"]), all(of[0].is_contiguous() for of in parts.values())
    size = parts["parameter"][0].numel()
    if count > 1 or size <= _BUCKET_VALUES or not contiguous:
        yield 0, parts
        return
    flat = {name: of[0].view(-1) for name, of in parts.items()}
    for start in range(0, size, _BUCKET_VALUES):
        yield start, {name: [values[start : start + _BUCKET_VALUES]] for name, values in flat.items()}


def _update(parts: _Parts, group: dict[str, Any], random_bits: Callable[[torch.device], torch.Generator]) -> None:
    """One step of AdamW over these tensors, in place.

    Args:
        random_bits: for the stochastic rounding, on a device.
    """
    beta1, beta2 = group["betas"]
    compensated = "compensation" in parts
    gradient = _joined(parts["gradient"])
    mean = _joined(parts["exp_avg"]).lerp_(gradient, 1 - beta1)
    square = _joined(parts["exp_avg_sq"]).mul_(beta2)
    square.addcmul_(gradient, gradient, value=1 - beta2)
    value = _joined(parts["parameter"])
    if compensated:
        value += _joined(parts["compensation"])
    value.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = (square / (1 - beta2 ** group["steps"])).sqrt_().add_(group["eps"])
    value.addcdiv_(mean / (1 - beta1 ** group["steps"]), denominator, value=-group["lr"])
    _split_into(mean, parts["exp_avg"])
    if compensated:
        square = _stochastically_rounded(square, random_bits(square.device))
    _split_into(square, parts["exp_avg_sq"])
    _split_into(value, parts["parameter"])
    if compensated:
        _split_into(value - _joined(parts["parameter"]), parts["compensation"])


def _check_state(state_dict: dict[str, Any], groups: list[dict[str, Any]], params: list[Tensor]) -> None:
    sizes = [[len(group["params"]) for group in of] for of in (state_dict["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the state is of groups of {sizes[0]} parameters, and there are {sizes[1]}")
    if not all({"steps", "seed"} <= group.keys() for group in state_dict["param_groups"]):
        raise ValueError("the state is of another optimizer than compensated AdamW")
    for index, entries in state_dict["state"].items():
        if entries["exp_avg"].shape != params[index].shape:
            raise ValueError(
                f"the state is of other parameters: {tuple(entries['exp_avg'].shape)} there and "
                f"{tuple(params[index].shape)} here"
            )


def buckets(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype and device, two million values or a single larger one: few kernels, little fp32."""
    bucket: list[Tensor] = []
    for parameter in params:
        kind = (parameter.dtype, parameter.device)
        full = sum(local(p).numel() for p in bucket) + local(parameter).numel() > _BUCKET_VALUES
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


def _random_bits(
    group: dict[str, Any], number: int, start: int, sharded: bool
) -> Callable[[torch.device], torch.Generator]:
    """Makes the generator for a slice of a bucket in one step; each process its own, if it holds shards of its own."""
    process = torch.distributed.get_rank() if sharded else 0
    # Hashed, for the CPU's generator looks at 32 bits of a seed only.
    name = f"{group['seed']} {group['steps']} {number} {process}{f' {start}' if start else ''}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    return lambda device: torch.Generator(device).manual_seed(seed)


def _stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values of which bf16 keeps every bit: each rounded up or down with the probability that keeps its mean.

    A random number below 2¹⁶ is added to the bits that bf16 cuts off; if they overflow, the value is the next one.
    """
    bits = values.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32)
