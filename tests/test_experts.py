"""Routed experts against their definition in fp64; which modules are taken for experts; what computes, what does not.

Error budgets as in `test_dora`: ‖ours − truth‖ / ‖truth‖, fp32 2e-5, bf16 1.5e-2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qdora import AdapterConfig
from qdora.dense import DenseWeight
from qdora.dora import DoRALinear
from qdora.experts import (
    RoutedExperts,
    count_choices,
    expand_experts,
    hollow_experts,
    most_uneven,
    stacks_left,
    uneven_for_all,
)
from qdora.gated import gated
from qdora.inject import adapt
from qdora.nf4 import NF4Weight
from qdora.nf4format import quantize_nf4
from qdora.workspace import Workspace, assume
from tests.memory import allocated_by
from tests.reference import dora, experts
from tests.test_dora import BUDGET, relative_error

EXPERTS, HIDDEN, INNER, TOKENS, CHOICES = 5, 64, 96, 40, 2


def stacked(hidden: int = HIDDEN, inner: int = INNER, count: int = EXPERTS) -> nn.Module:
    """A module that holds transformers' own experts, as a model does."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=count)
    config._experts_implementation = "eager"
    holder = nn.Module()
    holder.experts = Qwen3MoeExperts(config)
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return holder


def routed(kind: str, dtype: torch.dtype, **shape: int) -> nn.Module:
    holder = stacked(**shape)
    stacks = [parameter.detach() for parameter in (holder.experts.gate_up_proj, holder.experts.down_proj)]
    ours = hollow_experts(holder)["experts"]

    def weight_of(number: int, name: str) -> NF4Weight | DenseWeight:
        matrix = ours.cut(*stacks, number, name)
        return NF4Weight.from_tensors(quantize_nf4(matrix)) if kind == "nf4" else DenseWeight(matrix.to(dtype))

    ours.fill(weight_of)
    return holder


def routing(tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Choices of which the last expert gets none, and weights."""
    torch.manual_seed(1)
    chosen = torch.rand(tokens, EXPERTS - 1).topk(CHOICES).indices
    return chosen, torch.rand(tokens, CHOICES).to(dtype)


def adapted(holder: nn.Module, dtype: torch.dtype, use_dora: bool) -> None:
    config = AdapterConfig(rank=4, alpha=8, use_dora=use_dora, dtype=str(dtype).removeprefix("torch."))
    for path, _ in [*holder.named_modules()]:
        if path.endswith("_proj"):
            adapt(holder, path, config)
    for layer in holder.modules():
        if isinstance(layer, DoRALinear):
            nn.init.normal_(layer.lora_B, std=0.05)
            if layer.magnitude_offset is not None:
                nn.init.normal_(layer.magnitude_offset, std=0.1)


def truth_of(layer: Any, found: dict[str, Tensor], name: str) -> Any:
    """The linear in fp64, its trained parts noted as they are needed."""
    W = layer.base.dequantize(torch.float32).double()
    if not isinstance(layer, DoRALinear):
        return lambda x: x @ W.t()
    A, B = (part.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    found |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    m = None
    if layer.magnitude_offset is not None:
        m = (W.norm(dim=1) + layer.magnitude_offset.detach().double()).requires_grad_()
        found[f"{name}.magnitude_offset"] = m
    return partial(dora.forward, W=W, A=A, B=B, magnitude=m, scaling=layer.scaling)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("method", ["frozen", "lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_every_gradient(kind: str, method: str, dtype: torch.dtype) -> None:
    holder = routed(kind, dtype)
    if method != "frozen":
        adapted(holder, dtype, method == "dora")
    ours: Any = holder.experts
    chosen, weights = routing(dtype=dtype)
    x, g = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_(), torch.randn(TOKENS, HIDDEN).to(dtype)
    weights.requires_grad_()
    y = ours(x, chosen, weights)
    y.backward(g)

    parts: dict[str, Tensor] = {}
    linears = [
        tuple(truth_of(ours.get_submodule(f"{n}.{name}"), parts, f"{n}.{name}") for name in ours.names)
        for n in range(EXPERTS)
    ]
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    truth = experts.forward(x64, chosen, w64, linears)
    truth.backward(g.double())
    assert relative_error(y.detach(), truth.detach()) < BUDGET[dtype]
    assert relative_error(x.grad, x64.grad) < BUDGET[dtype]
    assert relative_error(weights.grad, w64.grad) < BUDGET[dtype]
    trained = dict(ours.named_parameters())
    for name, part in parts.items():
        if name.startswith(f"{EXPERTS - 1}."):  # it had no tokens
            assert not trained[name].grad.any()
        else:
            assert relative_error(trained[name].grad, part.grad) < BUDGET[dtype], name


def test_it_is_the_function_that_transformers_computes() -> None:
    theirs, ours = stacked(), stacked()
    expand_experts(ours)
    chosen, weights = routing()
    x = torch.randn(TOKENS, HIDDEN)
    assert (
        relative_error(ours.experts(x, chosen, weights).detach(), theirs.experts(x, chosen, weights).detach().double())
        < 1e-6
    )


def test_experts_join_gate_and_up_leanly_or_as_their_own_module_does() -> None:
    x = torch.randn(7, HIDDEN)
    chosen, weights = torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1)

    def own(stacks: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return stacks.act_fn(gate).clamp(max=0.1) * up

    for activation, clamps, lean in [("silu", False, True), ("relu", False, False), ("silu", True, False)]:
        theirs, ours = stacked(), stacked()
        for holder in (theirs, ours):
            holder.experts.act_fn = ACT2FN[activation]
            if clamps:
                holder.experts._apply_gate = partial(own, holder.experts)
        expand_experts(ours)
        assert (ours.experts._join.func is gated) == lean
        expected, found = (each.experts(x, chosen, weights) for each in (theirs, ours))
        # transformers' eager forward does not ask for what is clamped here
        assert (relative_error(found.detach(), expected.detach().double()) < 1e-6) != clamps


def test_dense_experts_are_windows() -> None:
    holder = stacked()
    before = {parameter.untyped_storage().data_ptr() for parameter in holder.parameters()}
    expand_experts(holder)
    assert {parameter.untyped_storage().data_ptr() for parameter in holder.parameters()} == before


def test_only_experts_with_tokens_are_dequantized_and_never_whole() -> None:
    """Eight experts of 3 × 128 KiB each in fp32; a tile has 16 KiB."""
    holder = routed("nf4", torch.float32, hidden=128, inner=256, count=8)
    asked: list[int] = []
    for number in range(8):
        for linear in holder.experts.get_submodule(str(number)).values():
            linear.register_forward_pre_hook(lambda *_, number=number: asked.append(number))
    x = torch.randn(16, 128).requires_grad_()
    chosen, weights = torch.tensor([[2, 5]]).expand(16, 2), torch.rand(16, 2)

    def step() -> None:
        y = torch.utils.checkpoint.checkpoint(holder.experts, x, chosen, weights, use_reentrant=False)
        y.sum().backward()

    with assume(Workspace(tile_bytes=2**14)):
        step()
        assert set(asked) == {2, 5}
        # the activations of an expert: 16 tokens of 2 × 256 + 256 + 128, some of them a few times
        assert allocated_by(step) < 3 * 128 * 2**10


def test_adapters_of_an_expert_without_tokens_have_gradients_of_zero() -> None:
    """As with transformers' stacks; without one, momentum would stand still, and processes that sum them would part."""
    holder = routed("nf4", torch.float32)
    adapted(holder, torch.float32, use_dora=True)
    chosen, weights = routing()
    holder.experts(torch.randn(TOKENS, HIDDEN), chosen, weights).sum().backward()
    idle = holder.experts.get_submodule(str(EXPERTS - 1))
    trained = [parameter for parameter in idle.parameters() if parameter.requires_grad]
    assert len(trained) == 9
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


def test_a_token_s_gradients_are_summed_in_fp32_and_in_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 + 1 is 256 in bf16. Experts that do nothing leave the sum alone to be seen."""
    monkeypatch.setattr(RoutedExperts, "_expert", lambda self, number, x_NH: x_NH)
    holder, tokens = routed("dense", torch.bfloat16), 11
    x = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.stack([torch.randperm(EXPERTS) for _ in range(tokens)])
    weights = torch.ones(tokens, EXPERTS, dtype=torch.bfloat16)
    weights[:, 0] = 256
    y = holder.experts(x, chosen, weights)
    made: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.zeros.default:
                made.append(result.dtype)
            return result

    with Watch():
        y.sum().backward()
    assert made == [torch.float32]
    assert x.grad is not None
    assert (x.grad == 256 + EXPERTS - 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_that_no_gradient_goes_to(dtype: torch.dtype) -> None:
    """Those of the first layer that trains, whose adapters still learn."""
    holder = routed("nf4", dtype)
    adapted(holder, dtype, use_dora=True)
    chosen, weights = routing(dtype=dtype)
    x = torch.randn(TOKENS, HIDDEN).to(dtype)
    holder.experts(x, chosen, weights).sum().backward()
    alone = [parameter.grad for parameter in holder.parameters() if parameter.requires_grad]
    holder.zero_grad()
    x.requires_grad_()
    holder.experts(x, chosen, weights).sum().backward()
    beside = [parameter.grad for parameter in holder.parameters() if parameter.requires_grad]
    assert x.grad is not None
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_a_gradient_that_a_hook_shares_is_left_alone() -> None:
    holder = routed("nf4", torch.float32)
    adapted(holder, torch.float32, use_dora=True)
    chosen, weights = routing()
    first: Any = holder.experts.get_submodule("0")
    down = first[holder.experts.names[2]]
    added = torch.zeros(down.in_features, requires_grad=True)
    gradients: list[Tensor] = []

    def add(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        more = added.expand_as(inputs[0]) + 0
        more.register_hook(gradients.append)
        return (inputs[0] + more,)

    down.register_forward_pre_hook(add)
    holder.experts(torch.randn(TOKENS, HIDDEN), chosen, weights).sum().backward()
    (gradient,) = gradients
    assert torch.equal(added.grad, gradient.sum(0))


def test_what_is_taken_for_experts() -> None:
    holder = nn.Module()
    small = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 2}
    with torch.device("meta"):
        holder.mixtral, holder.gpt_oss, holder.elsewhere = nn.Module(), nn.Module(), nn.Module()
        holder.mixtral.experts = MixtralExperts(MixtralConfig(**small))
        holder.gpt_oss.experts = GptOssExperts(GptOssConfig(**small))  # transposed, interleaved, with biases
        holder.elsewhere.mixture = MixtralExperts(MixtralConfig(**small))
    found = hollow_experts(holder)
    assert found.keys() == {"mixtral.experts"}
    assert found["mixtral.experts"].names == ("w1", "w3", "w2")
    assert isinstance(holder.mixtral.experts, RoutedExperts)
    assert list(stacks_left(holder)) == ["gpt_oss.experts"]


def test_counts() -> None:
    chosen = torch.tensor([[0, 2], [2, 0], [0, 3]]).reshape(-1).sort().values
    assert count_choices(chosen, 5, 2) == [3, 0, 2, 1, 0]
    assert most_uneven(chosen, 5, 2) == [3, 3, 0, 0, 0]
    assert uneven_for_all(chosen, 5, 2) == [3, 1, 1, 1, 0]
    assert uneven_for_all(chosen[:3], 1, 1) == most_uneven(chosen[:3], 1, 1) == [3]
