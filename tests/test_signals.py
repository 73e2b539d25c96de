"""A signal ends the work cleanly; a training saves first, and its command goes on from there."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import Launcher
from stress_kill import Case, differences, digests, measure

from qdora import signals
from qdora.signals import Stopped, StopRequest, ending_cleanly


@pytest.fixture
def defaults() -> Iterator[None]:
    """The handlers of a process that has just started."""
    numbers = (signal.SIGTERM, signal.SIGHUP)  # `nohup` has the second one ignored
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("defaults")
def test_sigterm_unwinds() -> None:
    for number, name, status in ((signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)):
        with pytest.raises(Stopped, match=f"stopped by {name}") as caught, ending_cleanly():
            signal.raise_signal(number)
        assert caught.value.status == status
        assert not isinstance(caught.value, Exception)
        assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("defaults")
def test_a_request_waits(capfd: pytest.CaptureFixture[str]) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert request.number == 0
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
    assert "SIGINT: finishing this step, then saving; once more ends at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is interrupt


@pytest.mark.usefixtures("defaults")
def test_a_launcher_s_echo_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on what the terminal has sent to its processes too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended: list[int] = []
    monkeypatch.setattr(signals.signal, "raise_signal", ended.append)
    with StopRequest() as request:
        request._ask(signal.SIGTERM, None)
        request._ask(signal.SIGTERM, None)
        assert not ended
        later = time.monotonic() + 3
        monkeypatch.setattr(signals.time, "monotonic", lambda: later)
        request._ask(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]


def test_what_was_started_to_ignore_a_signal_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ending_cleanly(), StopRequest() as request:
            signal.raise_signal(signal.SIGTERM)
        assert request.number == 0
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_quantize_and_merge_leave_nothing(
    by: Any, status: int, cases: dict[str, Case], launcher: Launcher, tmp_path: Path
) -> None:
    for name in ("quantize", "merge"):
        box = tmp_path / name
        box.mkdir()
        launcher.start(cases[name].arguments, box, kill_at=12, by=by)
        assert launcher.wait() == status
        assert (
            (box / "log").read_text().splitlines()[-1].startswith(("qdora: stopped by SIGTERM", "qdora: interrupted"))
        )
        assert {path.name for path in box.iterdir()} == {"log", "changes"}


@pytest.mark.parametrize(("by", "status", "at"), [(signal.SIGTERM, 143, 0.4), (signal.SIGINT, 130, 0.6)])
def test_a_training_saves_and_goes_on(
    by: Any, status: int, at: float, cases: dict[str, Case], launcher: Launcher, tmp_path: Path
) -> None:
    case, box = cases["train, the best kept"], tmp_path / "box"
    if not case.expected:
        measure(case, launcher, tmp_path / "whole")
    box.mkdir()
    launcher.start(case.arguments, box, kill_at=int(at * case.changes), by=by)
    assert launcher.wait() == status
    said = (box / "log").read_text()
    line = said.splitlines()[-1]
    name = signal.Signals(by).name
    assert line.startswith(f"qdora: stopped by {name} after step "), said
    assert line.endswith("; the same command goes on from there")
    checkpoint = line.partition("saved as ")[2].partition(";")[0]
    assert (box / checkpoint / "trainer_state.json").is_file()
    launcher.start(case.arguments, box)
    assert launcher.wait() == 0
    assert f"going on from {Path(checkpoint).name}" in (box / "log").read_text()
    assert not differences(case.expected, digests(box / "out"))
