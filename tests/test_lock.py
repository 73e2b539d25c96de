"""One run at a time at an output, and a lock that is never stale."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qdora
from qdora import ConfigError
from qdora.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from qdora.lock import locked
with locked(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(file: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_until_the_first_is_gone_however_it_goes(tmp_path: Path) -> None:
    file = tmp_path / "deep" / ".out.lock"
    process = holder(file)
    with (
        pytest.raises(ConfigError, match=rf"another run \(process {process.pid}\) is writing to out; wait"),
        locked(file, "out"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.exists()  # which means nothing
    with locked(file, "out"):
        assert int(file.read_text()) == os.getpid()
    assert os.listdir(tmp_path) == ["deep"]


def test_what_was_made_for_the_lock_goes_with_it(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / ".lock", "out"):
        pass
    assert not os.listdir(tmp_path)
    with locked(tmp_path / "a" / "b" / ".lock", "out"):
        (tmp_path / "a" / "kept").touch()
    assert os.listdir(tmp_path / "a") == ["kept"]


def test_a_file_that_was_removed_meanwhile_locks_nothing(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file, "out"):
        file.unlink()
        with locked(file, "out"), pytest.raises(ConfigError, match="another run"), locked(file, "out"):
            pass


def test_a_forked_worker_does_not_hold_it_on(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    with locked(tmp_path / ".lock", "out"):
        worker = fork.Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        with locked(tmp_path / ".lock", "out"):
            pass
    finally:
        worker.kill()
        worker.join()


def test_the_verbs_refuse(tiny: Path, tiny_nf4: Path, tiny_adapter: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(tmp_path / ".out.lock", out):
        with pytest.raises(ConfigError, match="another run"):
            qdora.quantize(tiny, out)
        with pytest.raises(ConfigError, match="another run"):
            qdora.merge(tiny_nf4, tiny_adapter, out)
    with locked(out / ".qdora.lock", out), pytest.raises(ConfigError, match="another run"):
        qdora.train(model_name_or_path=str(tiny_nf4), dataset=str(pairs_file), output_dir=str(out), use_cpu=True)
    assert not os.listdir(tmp_path)
