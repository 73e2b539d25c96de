"""Two thousand damaged and hostile inputs: each ends in success or in one clear error."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.fuzz_kinds import KINDS, schedule
from tests.fuzzing import SOUND, watch
from tests.mutate import mutate_bytes, mutate_json, mutate_safetensors


@pytest.mark.parametrize("mutants", [500, pytest.param(2_100, marks=pytest.mark.slow)])
def test_every_mutant_is_read_or_refused(mutants: int, tmp_path: Path) -> None:
    results = list(watch(tmp_path, range(mutants), seed=0))
    assert [result.number for result in results] == list(range(mutants))
    bad = [f"{r.number} {r.kind}, {r.how}: {r.outcome}\n{r.said}" for r in results if r.outcome not in SOUND]
    assert not bad, "\n\n".join(bad[:5])
    counts = Counter((result.kind, result.outcome) for result in results)
    for kind in KINDS:
        assert counts[kind, "refused"], f"nothing of {kind} was refused, so nothing of it was damaged"
    assert sum(counts[kind, "read"] for kind in KINDS) > mutants / 20  # and not everything is refused


def test_mutants_are_made_again_from_their_seed() -> None:
    content = b'{"a": [1, 2, {"b": null}], "c": "text"}'
    for mutate, number in itertools.product((mutate_bytes, mutate_json), range(50)):
        assert mutate(content, Random(number)) == mutate(content, Random(number))
    assert len({mutate_json(content, Random(number)).content for number in range(50)}) > 30


def test_the_watcher_sees_what_it_is_for(tmp_path: Path) -> None:
    """It names the number of a mutant that takes longer than it may, here one of the slowest kind."""
    number = schedule().index("gguf")
    results = list(watch(tmp_path, range(number, number + 1), seed=0, seconds=1e-9))
    assert [(result.number, result.kind, result.outcome) for result in results] == [(number, "gguf", "hung")]


def test_every_kind_has_its_share() -> None:
    assert Counter(schedule()) == {name: kind.share for name, kind in KINDS.items()}


def test_a_damaged_safetensors_file_is_another_file(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}'
    )
    content = len(header).to_bytes(8, "little") + header + bytes(9)
    mutants = [mutate_safetensors(content, Random(number), tmp_path / "canary") for number in range(100)]
    assert all(mutant.content != content for mutant in mutants if mutant.fatal)
    assert sum(mutant.fatal for mutant in mutants) > 50
