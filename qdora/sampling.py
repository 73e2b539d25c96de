"""The order of rows that are grouped by length: one for each epoch, whatever else was drawn before it.

The trainer's sampler draws from the process' own generator. A run that goes on in a later epoch has drawn less than one
that never stopped, so it would meet some rows twice and others never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["EpochSeeded"]


class EpochSeeded(Sampler[int]):
    """A sampler whose draws begin anew with each epoch.

    Args:
        sampler: draws from its attribute `generator`.
        seed: to which the epoch's number is added.
        epoch: returns the number of the epoch. (`set_epoch` is not called through all that accelerate wraps a sampler
            in.)
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
