"""How well a model predicts answers: the loss a token over all rows, and each row's likelihood.

Every token counts alike, whatever batch it came in: sums of −log p are added up and divided once. (The mean of batches'
means, which trainers report, depends on how the rows were batched.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdora.loss import IGNORED

__all__ = ["Tally", "padded_batches", "row_likelihoods", "score"]


@dataclass(frozen=True)
class Tally:
    """Σ −log p over tokens."""

    nll: float
    """In nats."""
    tokens: int
    rows: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def score(
    entry: Any, batches: Iterable[Mapping[str, Any]], lean: bool, gather: Callable[[Tensor], Tensor] | None = None
) -> Tally:
    """The loss of all batches together.

    Args:
        entry: a `ScoredModel` in eval mode.
        batches: inputs of the model with `labels`, (batch, length), on its device.
        lean: whether the head is plain, see `ScoredModel.head_is_plain`.
        gather: (batch,) of this process to (all rows,) of all processes, each row once.
    """
    nll, tokens, rows = 0.0, 0, 0
    for batch in batches:
        by_row = entry(lean=lean, by_row=True, **batch)
        counts = (batch["labels"][:, 1:] != IGNORED).sum(1)
        if gather is not None:
            by_row, counts = gather(by_row), gather(counts)
        nll += float(by_row.double().sum())
        tokens += int(counts.sum())
        rows += len(counts)
    return Tally(nll, tokens, rows)


@torch.no_grad()
def row_likelihoods(
    entry: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    lean: bool,
    device: torch.device,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[float]:
    """Σ log p of each row's labels, in nats.

    Args:
        rows: (input_ids, labels) of each, unpadded.
        progress: wraps the list of batches, such as tqdm.
    """
    found = [0.0] * len(rows)
    for indices, batch in progress(list(padded_batches(rows, batch_size, device))):
        for index, nll in zip(indices, entry(lean=lean, by_row=True, **batch).tolist(), strict=True):
            found[index] = -nll
    return found


def padded_batches(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows in batches of like length, padded on the right: (which rows, the model's inputs)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        length = max(len(rows[i][0]) for i in indices)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}  # type: dict[str, list[list[int]]]
        for i in indices:
            ids, labels = rows[i]
            missing = length - len(ids)
            batch["input_ids"].append([*ids, *[0] * missing])
            batch["attention_mask"].append([1] * len(ids) + [0] * missing)
            batch["labels"].append([*labels, *[IGNORED] * missing])
        yield indices, {name: torch.tensor(values, device=device) for name, values in batch.items()}
