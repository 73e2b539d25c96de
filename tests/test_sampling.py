"""Rows grouped by length come in an order that the epoch decides, and nothing drawn before it."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from qdora.sampling import EpochSeeded

LENGTHS = list(range(1, 41))


def order(epoch: int, seed: int = 3, drawn: int = 0) -> list[int]:
    torch.manual_seed(drawn)
    sampler = EpochSeeded(LengthGroupedSampler(4, lengths=LENGTHS), seed, lambda: epoch)
    assert len(sampler) == len(LENGTHS)
    return list(sampler)


def test_each_epoch_has_its_order() -> None:
    assert order(1) == order(1, drawn=9)
    assert order(1) not in (order(0), order(1, seed=4))
    assert sorted(order(2)) == list(range(40))
