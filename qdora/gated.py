"""The gated MLP of most decoders, with a backward that keeps what its linears gave and nothing else.

    y = down(act(gate(x)) ⊙ up(x))

The idea. The widest tensors of a model are in here. For the two operations between the linears, autograd keeps three of
them, gate(x), act(gate(x)) and up(x), and in the backward six are alive at once. Four are enough. gate(x) and up(x) are
what DoRA keeps for the gradient of the magnitude anyway; act(gate(x)) is computed again, into the buffer that becomes
the gradient of up(x); and the gradient that comes in becomes the one of gate(x), in place.

That one may be overwritten because the projection down made it, for this and nobody else: ours does, so it is done
behind ours only, and not if a hook may put something between the two. (Who keeps gradients that hooks saw there, must
copy them.)

The constraint. Not a bit may change: the operations are those of transformers, in its order and dtype, forward and
backward. A module is taken for such an MLP by what it is made of (three linears, an activation, no more) and by what it
answers: with small linears in the place of its own it must give the same bits, in fp32 and bf16, for small numbers and
for huge ones, which some models clamp.

The rejected alternative: one node for the projection down as well, which would own that gradient without asking. It
would have to do everything that an adapted linear does, a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qdora.dora import DoRALinear, FrozenLinear
from qdora.trial import same_bits, takes_one_input, with_parts

__all__ = ["GatedMLP", "activation_of", "gated", "joins_as", "makes_a_gradient_of_its_own", "replace_mlps"]

_LINEARS = ("gate_proj", "up_proj", "down_proj")
_PARTS = {*_LINEARS, "act_fn"}
_TRIED = 96


class _Activation(NamedTuple):
    """A function of each value, and its gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]
    """Of the output's gradient and the input; writes to `grad_input`, which may be the first."""


_gelu_backward = torch.ops.aten.gelu_backward.grad_input
# By name, for a model is pickled with its parts, and torch's operators are not.
_ACTIVATIONS = {
    "silu": _Activation(functional.silu, torch.ops.aten.silu_backward.grad_input),
    "gelu_tanh": _Activation(partial(functional.gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh")),
    "gelu": _Activation(functional.gelu, _gelu_backward),
}


class GatedMLP(nn.Module):
    """y = down(act(gate(x)) ⊙ up(x)), with the linears and the activation of the module whose place it takes."""

    def __init__(self, original: Any, activation: str) -> None:
        super().__init__()
        for name, part in original.named_children():
            self.add_module(name, part)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in _LINEARS)
        y: Tensor = down(gated(gate(x), up(x), self._activation, makes_a_gradient_of_its_own(down)))
        return y


def makes_a_gradient_of_its_own(linear: nn.Module) -> bool:
    """Whether the gradient of what it is called with is nobody else's. Hooks may see and keep that, or its input."""
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks)
    return isinstance(linear, DoRALinear | FrozenLinear) and not any(hooks)


def gated(gate: Tensor, up: Tensor, activation: str, consumes_gradient: bool) -> Tensor:
    """act(gate) ⊙ up, differentiable in both.

    Args:
        activation: a name that `activation_of` gives.
        consumes_gradient: overwrite the gradient of the result, which nobody else may have then.
    """
    product: Tensor = _Gated.apply(gate, up, _ACTIVATIONS[activation], consumes_gradient)
    return product


class _Gated(torch.autograd.Function):
    """See the top of this file."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: _Activation, consumes_gradient: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.consumes_gradient = activation, consumes_gradient
        return activation.forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        activation: _Activation = ctx.activation
        dup = activation.forward(gate).mul_(g)
        dgate = g.mul_(up) if ctx.consumes_gradient else g * up
        activation.backward(dgate, gate, grad_input=dgate)
        return dgate, dup, None, None


def activation_of(module: Any) -> str | None:
    """The name of the activation that a module computes, found out by trying; None if it is unknown here."""
    return next((name for name, known in _ACTIVATIONS.items() if _alike(module, known.forward)), None)


def joins_as(join: Callable[[Tensor, Tensor], Tensor], activation: str) -> bool:
    """Whether a function of gate and up is `gated`, found out by trying."""
    return _alike(
        lambda values: join(values, values.flip(-1)),
        lambda values: gated(values, values.flip(-1), activation, consumes_gradient=False),
    )


def _alike(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> bool:
    """Whether two functions give the same bits, for small values and huge ones, in two dtypes."""
    small = torch.linspace(-9, 9, _TRIED, device="cpu", dtype=torch.float32)
    values = torch.stack([small, 1e7 * small])
    return same_bits(one, other, values, values.bfloat16())


def replace_mlps(model: nn.Module) -> None:
    """Put a `GatedMLP` in the place of each module that computes the same, with its parts, in place."""
    for path, module in list(model.named_modules()):
        if _is_made_of_these(module) and (activation := activation_of(module.act_fn)) is not None:
            mlp = GatedMLP(module, activation)
            if _answer_alike(module, mlp):
                model.set_submodule(path, mlp.train(module.training))


def _is_made_of_these(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    usual = names == _PARTS and not own and not isinstance(module, GatedMLP)
    return usual and takes_one_input(module)


def _answer_alike(module: nn.Module, mlp: GatedMLP) -> bool:
    linears = {name: _Product(weight) for name, weight in zip(_LINEARS, _trial_weights(), strict=True)}
    return _alike(*(with_parts(each, {}, linears) for each in (module, mlp)))


@cache
def _trial_weights() -> list[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (_TRIED, _TRIED)
    return [torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) / 9 for _ in _LINEARS]


class _Product(nn.Module):
    """The least that passes for a linear."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t().to(x.dtype)
