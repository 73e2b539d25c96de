"""A training outlasts whoever listened to it."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdora.listeners import outlasting_listeners


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_stream_that_is_lost_is_told_once_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", listening)
    with outlasting_listeners():
        print("a")
        print("b", flush=True)
        assert not sys.stdout.isatty()
        print("c", file=sys.stderr)
    said = listening.getvalue().splitlines()
    assert said == ["qdora: standard output takes nothing any more (Input/output error); the training goes on", "c"]
    assert sys.stderr is listening


def test_both_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    with outlasting_listeners():
        print("a")
        print("b", file=sys.stderr)
    with pytest.raises(OSError, match="Input"):
        print("a")


def test_one_that_was_never_there_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", Gone())
    with outlasting_listeners():
        assert sys.stderr is None
        print("a")


def test_a_reader_that_leaves(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    """`qdora train … | head -1`: the adapter is there all the same."""
    flags: dict[str, Any] = {
        "model_name_or_path": tiny_nf4,
        "dataset": pairs_file,
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "logging_steps": 1,
        "max_length": 64,
        "use_cpu": "true",
        "report_to": "none",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "qdora", "train", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait() == 0
    assert "standard output takes nothing any more (Broken pipe); the training goes on" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
