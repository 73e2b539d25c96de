"""The ledger over real tensors and fake ones: each storage once, from its birth to its death."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qdora.ledger import Diary, Ledger


@pytest.mark.parametrize("fake", [False, True])
def test_a_storage_counts_once_while_it_lives(fake: bool) -> None:
    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad(), ledger:
        a = torch.zeros(100)
        b = a.view(10, 10).t()
        b.add_(1)
        assert ledger.held == ledger.most == 400
        c = a + 1
        del a
        assert ledger.held == 800, "a view keeps its storage"
        del b
        assert (ledger.held, ledger.most) == (400, 800)
        ledger.restart()
        assert ledger.most == 400
        del c
    assert (ledger.held, ledger.most) == (0, 400)


def test_what_was_there_is_not_counted() -> None:
    there = torch.zeros(100)
    ledger = Ledger()
    ledger.ignore([there, None])
    with ledger:
        there.mul_(2)
        there[:50].add_(1)
        assert ledger.held == 0
        there.clone()
    assert (ledger.held, ledger.most) == (0, 400)


def test_gradients_that_nobody_asked_for_are_not_made() -> None:
    """Of the sum for the magnitude: over fakes it makes all three gradients, in truth the one that it is asked for."""
    most = []
    for mode in (torch.no_grad(), FakeTensorMode()):
        with mode:
            g, weight = torch.ones(64, 8), torch.ones(8)
            ledger = Ledger()
            ledger.ignore([g, weight])
            with ledger:
                torch.ops.aten.native_batch_norm_backward(
                    g, g, weight, None, None, weight, weight, True, 0.0, [False, True, False]
                )
            most.append(ledger.most)
    assert most == [32, 32]


def test_the_backward_is_seen_too() -> None:
    leaf = torch.ones(100, requires_grad=True)
    with Ledger() as ledger:
        (leaf * 2).sum().backward()
        assert leaf.grad is not None
        assert ledger.held == leaf.grad.nbytes
        assert ledger.most > leaf.grad.nbytes


def test_only_what_computes_is_written_down() -> None:
    a = torch.ones(4, 4)
    with Diary() as diary:
        a.t().reshape(2, 8).unsqueeze(0)
        assert diary.computations == 1, "the transposed matrix is copied"
        a.view(16)
        assert diary.computations == 1
        a @ a + 1
    assert diary.computations == 3
