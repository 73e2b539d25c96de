"""The order of rows that are grouped by length: one for each epoch, whatever else was drawn before it.

The trainer's sampler draws from the process' own generator. A run that goes on in a later epoch has drawn less than one
that never stopped, so it would meet some rows twice and others never.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["EpochSeeded"]


class EpochSeeded(Sampler[int]):
    """A sampler whose draws begin anew with each epoch.

    Args:
        sampler: draws from its attribute `generator`.
        seed: to which the epoch's number is added.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The loop over epochs calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
