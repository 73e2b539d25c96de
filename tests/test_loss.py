"""The chunked loss against torch's cross-entropy over all logits, in fp64."""

from __future__ import annotations

import pytest
import torch

from qdora.loss import IGNORED, answer_loss, nll_by_row
from qdora.workspace import CPU, Workspace, assume
from tests.memory import allocated_by


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4 * 50 * 7, 2**26])
@pytest.mark.parametrize("workspace", [CPU, Workspace(tile_bytes=2**20, block_bytes=4 * 50 * 3)])
def test_loss_and_gradient(dtype: torch.dtype, budget: float, bias: bool, chunk: int, workspace: Workspace) -> None:
    with assume(workspace):
        check_loss_and_gradient(dtype, budget, bias, chunk)


def check_loss_and_gradient(dtype: torch.dtype, budget: float, bias: bool, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 11, 16).to(dtype).requires_grad_()
    weight = torch.randn(50, 16).to(dtype)
    bias_V = torch.randn(50).to(dtype) if bias else None
    labels = torch.randint(0, 50, (3, 11))
    labels[:, :4] = IGNORED
    labels[2] = IGNORED
    (answer_loss(hidden, weight, labels, bias_V, chunk) / 3).backward()

    h = hidden.detach().double().requires_grad_()
    logits = h @ weight.double().t() + (0 if bias_V is None else bias_V.double())
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    (expected / 3).backward()
    ours = answer_loss(hidden, weight, labels, bias_V, chunk).detach()
    assert ours.dtype == torch.float32
    assert abs(float(ours) - float(expected)) <= budget * float(expected)
    by_row = nll_by_row(hidden, weight, labels, bias_V, chunk)
    assert by_row.sum() == pytest.approx(float(ours), rel=1e-5)
    assert by_row[2] == 0
    assert (hidden.grad.double() - h.grad).norm() <= budget * h.grad.norm()


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("trained", ["all", "bias", "weight"])
@pytest.mark.parametrize("rows_at_once", [4096, 12])
def test_a_head_that_is_trained_whole(
    rows_at_once: int, dtype: torch.dtype, budget: float, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdora.loss._ROWS_OF_PRODUCT", rows_at_once)
    torch.manual_seed(0)
    hidden = torch.randn(3, 11, 16).to(dtype).requires_grad_(trained == "all")
    weight, bias = torch.randn(50, 16).to(dtype), torch.randn(50).to(dtype)
    weight.requires_grad_(trained != "bias")
    bias.requires_grad_(trained != "weight")
    labels = torch.randint(0, 50, (3, 11))
    (answer_loss(hidden, weight, labels, bias, 4 * 50 * 7) / 7).backward()

    h, w, b = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias))
    logits = (h @ w.t() + b)[:, :-1].reshape(-1, 50)
    (torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / 7).backward()
    for ours, exact in ((hidden, h), (weight, w), (bias, b)):
        assert (ours.grad is None) == (not ours.requires_grad)
        if ours.grad is not None:
            assert (ours.grad.double() - exact.grad).norm() <= budget * exact.grad.norm()


@pytest.mark.parametrize("tokens", [387, 700])
def test_the_factor_of_the_loss_is_not_rounded(tokens: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 64).bfloat16().requires_grad_()
    loss = answer_loss(hidden, torch.randn(50, 64).bfloat16(), torch.randint(0, 50, (1, tokens)))
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (part,) = torch.autograd.grad(loss / tokens, hidden)
    ratio = float((part.double() * whole.double()).sum() / whole.double().square().sum()) * tokens
    assert abs(ratio - 1) < 2e-4  # 2e-3, if 1/tokens were in bf16


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_hidden_states_and_head_of_two_dtypes_under_autocast(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 9, 16).to(dtypes[0]).requires_grad_()
    weight, labels = torch.randn(50, 16).to(dtypes[1]), torch.randint(0, 50, (1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        answer_loss(hidden, weight, labels).backward()
    h = hidden.detach().double().requires_grad_()
    logits = (h @ weight.double().t())[0, :-1]
    torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").backward()
    assert hidden.grad.dtype == dtypes[0]
    assert (hidden.grad.double() - h.grad).norm() <= 2e-2 * h.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_the_logits_of_a_chunk_and_a_block_of_rows(dtype: torch.dtype) -> None:
    hidden = torch.randn(1, 301, 8).to(dtype).requires_grad_()
    weight, labels = torch.randn(20_000, 8).to(dtype), torch.zeros(1, 301, dtype=torch.long)
    chunk_bytes = 100 * weight.shape[0] * dtype.itemsize
    taken = allocated_by(lambda: answer_loss(hidden, weight, labels, chunk_bytes=chunk_bytes))
    block_bytes = CPU.block_bytes if dtype == torch.bfloat16 else 0
    assert taken < 1.02 * (chunk_bytes + block_bytes)


def test_nothing_to_learn_is_zero_not_nan() -> None:
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    loss = answer_loss(hidden, torch.randn(5, 8), torch.full((1, 4), IGNORED))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_in_evaluation_no_gradient_is_made() -> None:
    with torch.no_grad():
        loss = answer_loss(torch.randn(1, 4, 8), torch.randn(5, 8), torch.zeros(1, 4, dtype=torch.long))
    assert not loss.requires_grad
