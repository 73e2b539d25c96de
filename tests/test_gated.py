"""The gated MLP against transformers' own, bit for bit forward and backward, and what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from qdora.gated import GatedMLP, activation_of, gated, joins_as, replace_mlps
from tests.memory import allocated_by
from tests.test_dora import make_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["silu", "gelu_pytorch_tanh", "gelu"]


def theirs(name: str = "silu", dtype: torch.dtype = torch.float32) -> LlamaMLP:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=192, hidden_act=name)).to(dtype)


def adapted(name: str = "silu", **settings: Any) -> LlamaMLP:
    """With our linears, which own the gradients that they make."""
    mlp = theirs(name)
    for part, (inwards, outwards) in {"gate_proj": (64, 192), "up_proj": (64, 192), "down_proj": (192, 64)}.items():
        torch.manual_seed(len(part))
        setattr(mlp, part, make_layer("nf4", outwards, inwards, **settings))
    return mlp


def replaced(mlp: nn.Module) -> GatedMLP:
    holder = nn.ModuleDict({"mlp": mlp})
    replace_mlps(holder)
    found = holder["mlp"]
    assert isinstance(found, GatedMLP)
    return found


def known(name: str) -> str:
    activation = activation_of(ACT2FN[name])
    assert activation is not None
    return activation


def some(dtype: torch.dtype, *shape: int, seed: int = 1) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def all_gradients(mlp: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = mlp(leaf)
    y.backward(some(y.dtype, *y.shape, seed=2))
    found = [y.detach(), leaf.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)]
    mlp.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("consumes", [False, True])
def test_product_and_gradients_are_autograd_s_to_the_bit(name: str, dtype: torch.dtype, consumes: bool) -> None:
    leaves = [some(dtype, 3, 5, 40, seed=seed).requires_grad_() for seed in (1, 2)]
    g = some(dtype, 3, 5, 40, seed=3)
    expected = ACT2FN[name](leaves[0]) * leaves[1]
    found = gated(*leaves, known(name), consumes)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y, leaves, g.clone()) for y in (expected, found)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_fp64(name: str) -> None:
    leaves = [some(torch.float64, 4, 6, seed=seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(lambda gate, up: gated(gate, up, known(name), False), leaves)


def test_the_gradient_is_overwritten_only_if_it_is_ours() -> None:
    leaves = [some(torch.float32, 5, 40, seed=seed).requires_grad_() for seed in (1, 2)]
    for consumes in (False, True):
        g = some(torch.float32, 5, 40, seed=3)
        before = g.clone()
        gated(*leaves, known("silu"), consumes).backward(g)
        assert torch.equal(g, before) != consumes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_dense_mlp_computes_the_same_bits(name: str, dtype: torch.dtype) -> None:
    mlp, x = theirs(name, dtype), some(dtype, 2, 7, 64)
    expected, found = all_gradients(mlp, x), all_gradients(replaced(mlp), x)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": False}, {"dropout": 0.3}, {"use_dora": False, "dropout": 0.3}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_mlp_computes_the_same_bits(settings: dict[str, Any], dtype: torch.dtype) -> None:
    mlp, x = adapted(**settings), some(dtype, 2, 7, 64)
    results = []
    for each in (mlp, replaced(mlp)):
        torch.manual_seed(3)
        results.append(all_gradients(each, x))
    assert len(results[0]) >= 8
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_computes_the_same_bits_under_checkpointing(reentrant: bool) -> None:
    mlp, x = adapted(), some(torch.float32, 2, 7, 64)
    expected = all_gradients(mlp, x)
    ours = replaced(mlp)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = ours

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.mlp, x, use_reentrant=reentrant)
            return y

    assert all(torch.equal(*pair) for pair in zip(expected, all_gradients(Checkpointed(), x), strict=True))


def test_a_gradient_that_a_hook_shares_is_left_alone() -> None:
    """Something added before the projection down has the same gradient as what it is added to: the same tensor."""
    mlp, x = replaced(adapted()), some(torch.float32, 5, 64)
    start = torch.zeros(5, 192, requires_grad=True)
    added = start.exp() - 1
    mlp.down_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] + added,))
    mlp(x).sum().backward()
    expected = torch.autograd.grad(mlp.down_proj(leaf := some(torch.float32, 5, 192).requires_grad_()).sum(), leaf)
    assert torch.equal(start.grad, *expected)


@pytest.mark.parametrize(
    "register",
    [
        lambda linear, seen: linear.register_forward_hook(lambda _, inputs, y: seen.append(inputs[0])),
        lambda linear, seen: linear.register_full_backward_hook(lambda _, gs, __: seen.append(gs[0])),
    ],
)
def test_what_a_hook_has_seen_stays_as_it_was(register: Any) -> None:
    """The input of the projection down, of which there may be a loss; or the gradient of that."""
    mlp, x, seen = replaced(adapted()), some(torch.float32, 5, 64), []
    register(mlp.down_proj, seen)
    y = mlp(x)
    if seen:
        (gradient,) = torch.autograd.grad(y.square().sum(), seen)
    else:
        y.square().sum().backward()
        (gradient,) = seen
    leaf = (mlp.act_fn if hasattr(mlp, "act_fn") else functional.silu)(mlp.gate_proj(x)) * mlp.up_proj(x)
    leaf = leaf.detach().requires_grad_()
    mlp.down_proj._forward_hooks.clear()
    mlp.down_proj._backward_hooks.clear()
    (expected,) = torch.autograd.grad(mlp.down_proj(leaf).square().sum(), leaf)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_two_backwards_through_one_graph() -> None:
    leaves = [some(torch.float32, 5, 40, seed=seed).requires_grad_() for seed in (1, 2)]
    down = make_layer("nf4", 40, 40)
    loss = down(gated(*leaves, known("silu"), True)).square().sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_autocast_and_compile() -> None:
    mlp, x = adapted(), some(torch.float32, 2, 7, 64)
    ours = replaced(mlp)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), mlp(x))
    expected = all_gradients(ours, x)
    compiled: Any = torch.compile(ours, backend="aot_eager")
    assert all(torch.equal(*pair) for pair in zip(expected, all_gradients(compiled, x), strict=True))
    with torch.no_grad():
        assert torch.equal(ours(x), mlp(x))


def test_what_lives_at_once_is_four_of_the_widest() -> None:
    wide = 4 * 2**20  # bytes of one
    x = some(torch.float32, 512, 64)
    gate, up = (nn.Linear(64, 2048, bias=False).requires_grad_(False) for _ in range(2))
    down = make_layer("nf4", 64, 2048)

    def step(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def layer(x: Tensor) -> Tensor:
            y: Tensor = down(join(gate(x), up(x)))
            return y

        def run() -> None:
            checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False).sum().backward()

        return run

    usual = allocated_by(step(lambda gate, up: functional.silu(gate) * up))
    ours = allocated_by(step(partial(gated, activation=known("silu"), consumes_gradient=True)))
    assert ours < usual - 1.5 * wide
    assert ours < 4.6 * wide


@pytest.mark.parametrize("name", ["relu", "sigmoid", "linear", "gelu_new"])
def test_other_activations_stay(name: str) -> None:
    assert activation_of(ACT2FN[name]) is None
    holder = nn.ModuleDict({"mlp": theirs(name)})
    replace_mlps(holder)
    assert type(holder["mlp"]) is LlamaMLP


def test_how_gate_and_up_are_joined_is_found_out() -> None:
    silu = functional.silu
    for join, alike in [
        (lambda gate, up: up * silu(gate), True),
        (lambda gate, up: functional.gelu(gate) * up, False),
        (lambda gate, up: silu(gate.clamp(max=10)) * up, False),
        (lambda gate, up: silu(gate) * up.clamp(-10, 10), False),
        (lambda gate, up: (silu(gate.float()) * up.float()).to(gate.dtype), False),
        (lambda gate, up: gate.no_such_method(), False),
    ]:
        assert joins_as(join, "silu") == alike


def test_what_is_no_activation_is_none() -> None:
    assert activation_of(None) is None
    assert activation_of(nn.Linear(3, 3)) is None


class _Scaled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class _Dropping(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.5, self.training)


class _Two(LlamaMLP):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x)


class _Owner(LlamaMLP):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(()))


class _Clamped(LlamaMLP):
    """As DeepSeek-V4's."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(min=-10.0, max=10.0)
        y: Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


class _InFp32(LlamaMLP):
    """As Beam's."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.act_fn(self.gate_proj(x).float()) * self.up_proj(x).float()
        y: Tensor = self.down_proj(product.to(x.dtype))
        return y


class _Strict(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 64, "only my own size"
        return super().forward(x)


@pytest.mark.parametrize("kind", [_Scaled, _Dropping, _Two, _Owner, _Clamped, _InFp32, _Strict])
def test_what_computes_otherwise_or_may_stays(kind: type[LlamaMLP]) -> None:
    mlp = kind(LlamaConfig(hidden_size=64, intermediate_size=192)).eval()
    holder = nn.ModuleDict({"mlp": mlp})
    replace_mlps(holder)
    assert holder["mlp"] is mlp


def test_the_place_is_taken_with_parts_names_and_mode() -> None:
    for mlp in (theirs(), theirs().to("meta"), theirs(dtype=torch.bfloat16).eval()):
        training, holder = mlp.training, nn.ModuleDict({"mlp": mlp})
        names, parts = list(holder.state_dict()), dict(mlp.named_children())
        state = torch.random.get_rng_state()
        seeded = torch.initial_seed()
        replace_mlps(holder)
        assert torch.initial_seed() == seeded
        ours = holder["mlp"]
        assert isinstance(ours, GatedMLP)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert list(holder.state_dict()) == names
        assert dict(ours.named_children()) == parts
        assert ours.training == training
        assert all(part.training == training for part in parts.values())
        replace_mlps(holder)
        assert holder["mlp"] is ours
        assert copy.deepcopy(ours)._activation == ours._activation
