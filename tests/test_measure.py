"""Likelihoods and losses against plain fp64 log-softmax over all logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import qdora
from qdora.loss import IGNORED
from qdora.measure import Tally, padded_batches, row_likelihoods, score
from qdora.scoring import ScoredModel

CPU = torch.device("cpu")


def rows() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length, prompt in ((9, 3), (4, 1), (30, 29), (17, 0), (5, 5)):
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        found.append((ids, [IGNORED] * prompt + ids[prompt:]))
    return found


def likelihoods_in_fp64(model: torch.nn.Module) -> list[float]:
    found = []
    for ids, labels in rows():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(float(logits[i - 1, ids[i]]) for i in range(1, len(ids)) if labels[i] != IGNORED))
    return found


@pytest.fixture(scope="module")
def model(tiny_nf4: Path) -> torch.nn.Module:
    return qdora.load_model(tiny_nf4, dtype="float32").eval()


@pytest.mark.parametrize("lean", [True, False])
def test_rows_apart(model: torch.nn.Module, lean: bool) -> None:
    entry = ScoredModel(model, chunk_bytes=4 * 400 * 5)  # five positions at a time
    with torch.no_grad():
        expected = likelihoods_in_fp64(model)
    assert row_likelihoods(entry, rows(), lean, CPU, batch_size=2) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_token_counts_alike(model: torch.nn.Module, batch_size: int) -> None:
    with torch.no_grad():
        expected = likelihoods_in_fp64(model)
    batches = [batch for _, batch in padded_batches(rows(), batch_size, CPU)]
    tally = score(ScoredModel(model), batches, lean=True)
    assert (tally.tokens, tally.rows) == (6 + 3 + 1 + 16 + 0, 5)
    assert tally.loss == pytest.approx(-sum(expected) / 26, rel=1e-5)
    assert tally.perplexity == pytest.approx(math.exp(tally.loss))


def test_all_processes_count(model: torch.nn.Module) -> None:
    batches = [batch for _, batch in padded_batches(rows(), 5, CPU)]
    alone = score(ScoredModel(model), batches, lean=True)
    twice = score(ScoredModel(model), batches, lean=True, gather=lambda values: torch.cat([values, values]))
    assert (twice.tokens, twice.rows) == (52, 10)
    assert twice.loss == pytest.approx(alone.loss)


def test_a_hopeless_loss() -> None:
    assert Tally(1e6, 10, 1).perplexity == math.inf
    assert Tally(0.0, 0, 0).loss == 0
