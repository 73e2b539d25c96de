"""Killed anywhere, the same command ends with the same bits: a small sample of what `scripts/stress_kill.py` does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from launch import Launcher
from stress_kill import Case, measure, trial


@pytest.mark.parametrize("name", ["quantize --overwrite", "train", "train, the best kept", "merge --overwrite"])
def test_killed_anywhere(name: str, cases: dict[str, Case], launcher: Launcher, tmp_path: Path) -> None:
    case, dice = cases[name], random.Random(name)
    if not case.expected:
        measure(case, launcher, tmp_path / "whole")
    for number in range(1 if name.startswith("train") else 3):
        trial(case, launcher, tmp_path / "box", dice, by_clock=number == 2)
    assert not case.faults
    assert case.kills
    assert case.identical == case.trials
    assert case.most_steps_lost <= 3
