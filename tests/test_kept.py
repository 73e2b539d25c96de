"""Which checkpoints are whole, and which are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdora.kept import checkpoints_in, discard, fault_of, keep_newest, last_checkpoint, scratch_of, step_of


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Six checkpoints, and what only looks like one."""
    for step in (2, 10, 4, 30, 20, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for name in ("checkpoint-x", "checkpoint-", "earlier-checkpoint-7", "checkpoint-7b"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    return tmp_path


def steps(out: Path) -> list[int]:
    return [step_of(checkpoint) for checkpoint in checkpoints_in(out)]


def test_by_their_steps(out: Path) -> None:
    assert steps(out) == [2, 3, 4, 10, 20, 30]
    assert last_checkpoint(out) is None
    (out / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(out) == out / "checkpoint-10"


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 3, 4, 10, 20, 30]),
        (0, None, [2, 3, 4, 10, 20, 30]),
        (1, None, [30]),
        (1, 3, [3, 30]),
        (3, 3, [3, 20, 30]),
        (3, 30, [10, 20, 30]),
        (9, 2, [2, 3, 4, 10, 20, 30]),
    ],
)
def test_the_oldest_go_first_and_newest_and_best_never(
    limit: int | None, best: int | None, left: list[int], out: Path
) -> None:
    keep_newest(out, limit, out / "checkpoint-30", None if best is None else str(out / f"checkpoint-{best}"))
    assert steps(out) == left
    assert not scratch_of(out).exists()


def test_one_that_goes_loses_its_name_first(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "checkpoint-2" / "file").write_text("x")
    monkeypatch.setattr("qdora.kept.clear_scratch", lambda _: None)  # as if it were killed here
    discard(out / "checkpoint-2")
    assert steps(out)[0] == 3
    assert (scratch_of(out) / "checkpoint-2" / "file").exists()


def test_what_is_wrong_with_one(out: Path) -> None:
    assert "trainer_state.json" in str(fault_of(out / "checkpoint-2", complete=True))
