"""The norm against transformers' own, bit for bit forward, and against fp64 backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from qdora.norm import RMSNorm, replace_norms
from qdora.workspace import CPU, Workspace, assume
from tests.memory import allocated_by

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def theirs(size: int, dtype: torch.dtype = torch.float32) -> LlamaRMSNorm:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(size, eps=EPSILON)
    norm.weight.data = torch.rand(size) + 0.5
    return norm.to(dtype)


def ours(size: int, dtype: torch.dtype = torch.float32) -> RMSNorm:
    holder = nn.Sequential(theirs(size, dtype))
    replace_norms(holder)
    norm = holder[0]
    assert isinstance(norm, RMSNorm)
    return norm


def in_fp64(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape).mul_(torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 96), (2, 7, 96), (2, 7, 3, 96), (1, 1, 96), (0, 96)])
def test_the_forward_is_transformers_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = some(dtype, *shape)
    expected, found = theirs(96, dtype)(x), ours(96, dtype)(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_at_once", [1, 10, 33])
def test_blocks_of_rows_give_the_bits_of_all_at_once(rows_at_once: int, dtype: torch.dtype) -> None:
    norm, expected, results = ours(96, dtype), theirs(96, dtype), []
    for workspace in (CPU, Workspace(tile_bytes=1, block_bytes=4 * 96 * rows_at_once)):
        x = some(dtype, 3, 11, 96).requires_grad_()
        with assume(workspace):
            y = norm(x)
            dx, dweight = torch.autograd.grad(y.square().sum(), (x, norm.weight))
        results.append((y, dx, dweight))
    (y, dx, dweight), (whole, whole_dx, whole_dweight) = results
    assert torch.equal(y, expected(x))
    assert torch.equal(y, whole)
    assert torch.equal(dx, whole_dx)
    torch.testing.assert_close(dweight, whole_dweight)  # a sum over rows, in another order


def test_the_output_may_be_changed_in_place() -> None:
    y = ours(96)(torch.randn(2, 3, 96, requires_grad=True))
    y += 1
    y.sum().backward()


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        ours(96)(torch.randn(4, 192))


def test_compiled_it_does_not_mind_the_number_of_rows() -> None:
    norm, backend = ours(512), CompileCounter()
    compiled = torch.compile(norm, backend=backend, dynamic=True)
    frames = []
    for rows in (1000, 3000, 9000, 20000):
        x = some(torch.float32, 1, rows, 512)
        torch.testing.assert_close(compiled(x), norm(x))
        frames.append(backend.frame_count)
    assert frames[1:] == [frames[1]] * 3


def test_compiled_it_is_one_graph() -> None:
    norm, x = ours(96), some(torch.float32, 5, 96).requires_grad_()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    (expected,), (found,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (norm, compiled))
    torch.testing.assert_close(found, expected)


def test_in_inference_mode_it_is_transformers_too() -> None:
    with torch.inference_mode():
        x = some(torch.float32, 5, 96)
        assert torch.equal(ours(96)(x), theirs(96)(x))


def test_a_weight_in_fp32_makes_the_output_so() -> None:
    x = some(torch.bfloat16, 5, 96)
    expected, found = theirs(96)(x), ours(96)(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_fp64_as_near_as_transformers(dtype: torch.dtype) -> None:
    x, g = some(dtype, 33, 96), some(dtype, 33, 96).flip(0)

    def gradients(norm: Callable[[Tensor], Tensor], weight: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
        leaf = x.to(wide).requires_grad_()
        y = norm(leaf)
        return torch.autograd.grad(y, (leaf, weight), g.to(y.dtype))

    weight = theirs(96, dtype).weight.detach().double().requires_grad_()
    true = gradients(lambda leaf: in_fp64(leaf, weight), weight, torch.float64)
    errors = []
    for norm in (theirs(96, dtype), ours(96, dtype)):
        found = gradients(norm, norm.weight, dtype)
        assert [each.dtype for each in found] == [dtype, dtype]
        errors.append([relative_error(*pair) for pair in zip(found, true, strict=True)])
    # what rounding takes: in fp32 a few times, in 16 bits once or twice
    assert max(errors[1]) < (2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    assert all(error <= 1.05 * peer + 1e-7 for peer, error in zip(*errors, strict=True))


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def test_gradients_by_finite_differences() -> None:
    weight = torch.rand(6, dtype=torch.float64) + 0.5
    x = torch.randn(3, 6, dtype=torch.float64)
    norm = RMSNorm(nn.Parameter(weight), EPSILON)
    x32 = x.float().requires_grad_()
    expected = torch.autograd.functional.jacobian(lambda leaf: in_fp64(leaf, weight), x)
    found = torch.autograd.functional.jacobian(lambda leaf: norm.float()(leaf), x32.detach())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 3, 5, 96)])
def test_gradients_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = []
    for norm in (theirs(96), ours(96)):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(norm(leaf).square().sum(), (leaf, norm.weight)))
    torch.testing.assert_close(found[1], found[0])


def test_what_trains_decides_what_is_computed() -> None:
    norm = ours(96)
    x = some(torch.float32, 5, 96)
    norm.weight.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    norm(leaf).sum().backward()
    assert leaf.grad is not None
    assert norm.weight.grad is None
    norm.weight.requires_grad_(True)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    with torch.no_grad():
        assert not norm(x).requires_grad


def test_a_row_of_zeros_has_finite_gradients() -> None:
    leaf = torch.zeros(2, 96, requires_grad=True)
    ours(96)(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


def test_it_keeps_its_input_and_a_number_a_token() -> None:
    x = some(torch.bfloat16, 64, 2048).requires_grad_()

    def kept_by(norm: nn.Module) -> int:
        """Bytes beside what is there anyway: the input, and the weight."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            norm(x)
        for present in (x, norm.weight):
            kept.pop(present.untyped_storage().data_ptr(), None)  # type: ignore[operator, union-attr]
        return sum(kept.values())

    frozen = [make(2048, torch.bfloat16).requires_grad_(False) for make in (theirs, ours)]
    assert kept_by(frozen[0]) >= 64 * 2048 * 4
    assert kept_by(frozen[1]) == 64 * 4


def test_under_checkpointing_autocast_and_compile() -> None:
    x = some(torch.bfloat16, 5, 96).requires_grad_()
    norm = ours(96, torch.bfloat16)

    def gradient(call: Callable[[Tensor], Tensor]) -> Tensor:
        (found,) = torch.autograd.grad(call(x).float().square().sum(), x)
        return found

    expected = gradient(norm)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(norm, x, use_reentrant=reentrant).float().square().sum().backward()
        assert torch.equal(x.grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), theirs(96, torch.bfloat16)(x))
    compiled: Any = torch.compile(norm, backend="aot_eager")
    assert torch.equal(gradient(compiled), expected)


class _Clamped(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).clamp(-0.5, 0.5)


class _Strict(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise ValueError("only rows of my own")


@pytest.mark.parametrize(
    ("norm", "taken"),
    [
        (LlamaRMSNorm(96), True),
        (Qwen3RMSNorm(96), True),
        (Gemma3RMSNorm(96), False),
        (Qwen3NextRMSNormGated(96), False),
        (nn.RMSNorm(96), False),
        (nn.LayerNorm(96, bias=False), False),
        (nn.LayerNorm(96), False),
        (nn.Linear(96, 96, bias=False), False),
        (_Clamped(96), False),
        (_Strict(96), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_norm_is_taken_for_what_it_computes(norm: nn.Module, taken: bool) -> None:
    for placed in (norm, copy.deepcopy(norm).to("meta"), copy.deepcopy(norm).bfloat16().eval()):
        holder = nn.ModuleDict({"norm": placed})
        names = set(holder.state_dict())
        state = torch.random.get_rng_state()
        replace_norms(holder)
        assert isinstance(holder["norm"], RMSNorm) == taken
        assert set(holder.state_dict()) == names
        assert holder["norm"].training == placed.training
        assert torch.equal(torch.random.get_rng_state(), state)
        if taken:
            assert holder["norm"].weight is placed.weight


def test_it_says_what_it_is() -> None:
    assert repr(ours(96)) == "RMSNorm(96, epsilon=1e-05)"


def test_the_backward_takes_less_memory_than_autograd_s() -> None:
    x = some(torch.bfloat16, 256, 2048)

    def step(norm: nn.Module) -> Callable[[], None]:
        def run() -> None:
            norm(x.detach().requires_grad_()).backward(x)

        return run

    theirs_bytes, our_bytes = (
        allocated_by(step(make(2048, torch.bfloat16).requires_grad_(False))) for make in (theirs, ours)
    )
    assert our_bytes < theirs_bytes
