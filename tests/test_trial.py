"""What counts as the same answer, and that trying leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qdora.trial import same_bits, takes_one_input, with_parts

X = torch.linspace(-2, 2, 50)


class _Two(nn.Module):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x


def test_one_input() -> None:
    assert takes_one_input(nn.Linear(2, 2))
    assert not takes_one_input(_Two())


def test_every_input_decides() -> None:
    assert same_bits(functional.relu, lambda x: x.clamp(min=0), X, X.bfloat16())
    assert not same_bits(functional.relu, lambda x: x, X.abs(), X)
    assert not same_bits(lambda x: x, lambda x: x.nextafter(x + 1), X)


def test_an_error_is_another_answer() -> None:
    def fails(_: Tensor) -> Tensor:
        raise ValueError("not mine")

    assert not same_bits(fails, lambda x: x, X)


def test_no_random_state_moves() -> None:
    state = torch.random.get_rng_state()
    assert not same_bits(functional.dropout, lambda x: x, X)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("training", [False, True])
def test_other_parts_leave_the_module_as_it_is(training: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).train(training)
    first, other = module[0], nn.Linear(2, 2)
    trial = with_parts(module, {}, {"0": other})
    assert trial[0] is other
    assert trial[1] is module[1]
    assert module[0] is first
    assert (trial.training, module.training, module[1].training) == (True, training, training)
    weight = nn.Parameter(torch.ones(2, 2))
    assert with_parts(first, {"weight": weight}, {}).weight is weight
    assert first.weight is not weight
