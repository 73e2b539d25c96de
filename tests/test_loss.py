"""The chunked loss against torch's cross-entropy over all logits, in fp64."""

from __future__ import annotations

import pytest
import torch

from qdora.loss import IGNORED, answer_loss


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4 * 50 * 7, 2**26])
def test_loss_and_gradient(dtype: torch.dtype, budget: float, bias: bool, chunk: int) -> None:
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
    assert (hidden.grad.double() - h.grad).norm() <= budget * h.grad.norm()


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
