"""`qdora` commands as processes that start at once: forked off one that has imported everything and computed nothing.

Importing torch and transformers takes seconds, and a test that kills a command a hundred times would do little else.
The child runs `qdora.cli.main` as `python -m qdora` does, and a signal to it is a signal to a process of its own.

It may be told to kill itself just before the n-th time that it opens for writing, renames, removes or makes something
in its directory: so every gap between two such steps can be hit, which a clock rarely does.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "qdora.verbs.quantize",
    "qdora.verbs.merge",
    "qdora.verbs.train",
    "qdora.trainer",
    "qdora.drawing",
    "transformers.models.llama.modeling_llama",
    "bitsandbytes",
    "matplotlib.backends.backend_agg",
)
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}


class Launcher:
    """Starts one command at a time; use as a context manager.

    Args:
        threads: of the arithmetic in the children.
    """

    def __init__(self, threads: int = 1) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def start(
        self,
        arguments: Sequence[str],
        directory: Path,
        kill_at: int | None = None,
        by: signal.Signals = signal.SIGKILL,
        largest_file: int | None = None,
    ) -> int:
        """Start `qdora` in a directory and return its process id; what it prints goes to `log` there, after the old.

        Args:
            kill_at: before which change to its directory it gets the signal `by`, counted from 1.
            largest_file: in bytes; writing more fails, as it does on a full disk.
        """
        request = {
            "arguments": list(arguments),
            "directory": str(directory.resolve()),
            "kill_at": kill_at,
            "by": int(by),
            "largest_file": largest_file,
        }
        self._ask(json.dumps(request))
        return int(self._answer())

    def wait(self) -> int:
        """The status of the command that was started last: negative for a signal. Until then its number is its own."""
        self._ask("wait")
        return int(self._answer())

    def _ask(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


def changes_counted(directory: Path) -> int:
    """How many changes to its directory the last command that ended by itself had made there."""
    return int((directory / "changes").read_text())


class _Changes:
    """An audit hook that counts changes below a directory."""

    def __init__(self, directory: str, kill_at: int | None, by: int) -> None:
        self._below, self._kill_at, self._by, self.count = directory + os.sep, kill_at, by, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in WRITES
        if not writes or not isinstance(arguments[0], str | os.PathLike):
            return
        if (os.path.abspath(arguments[0]) + os.sep).startswith(self._below):
            self.count += 1
            if self.count == self._kill_at:
                os.kill(os.getpid(), self._by)


def run_child(request: dict[str, Any]) -> None:
    os.chdir(request["directory"])
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from qdora.cli import main

    if request["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    changes = _Changes(request["directory"], request["kill_at"], request["by"])
    sys.addaudithook(changes)
    status = main(request["arguments"])
    sys.stdout.flush()
    Path("changes").write_text(str(changes.count))
    os._exit(status)


def serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    print("ready", flush=True)
    child = 0
    for line in sys.stdin:
        if line == "wait\n":
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            try:
                run_child(json.loads(line))
            except BaseException:
                traceback.print_exc()  # an error that nobody foresaw
            finally:
                os._exit(70)
        print(child, flush=True)


if __name__ == "__main__":
    serve()
