"""The fuzzer: mutants of everything that is read, given to the functions that read it, in a process that is watched.

A mutant's number and the seed say all about it. A worker process reads one mutant after the other and tells of each;
it may hold so much memory and no more. The watcher gives each mutant so many seconds, and when the worker hangs or
dies, it notes on which mutant, and starts another at the next. What may come of a mutant:

    read             it was taken for sound
    refused          one QDoRAError of one line
    silent           it was taken for sound, and cannot be
    escaped          another error, which would be a traceback
    ran code         the canary's file is there
    grew             memory that a small file cannot be worth
    died, hung       what the watcher saw

The first two are as they should be. `python -m tests.fuzzing` is the worker; `scripts/fuzz.py` the long run.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
SOUND = ("read", "refused")
SECONDS, START_SECONDS = 60.0, 240.0
_GROWTH_BYTES, _ADDRESS_BYTES = 700 * 2**20, 4 * 2**30


@dataclass(frozen=True)
class Result:
    """What came of a mutant."""

    number: int
    kind: str
    how: str
    outcome: str
    said: str = ""


def watch(seeds: Path, numbers: range, seed: int, seconds: float = SECONDS) -> Iterator[Result]:
    """Run the mutants of these numbers, in order.

    Args:
        seeds: a directory for the sound inputs, made there if it is empty.
        seconds: after which a mutant hangs.
    """
    following = numbers.start
    while following < numbers.stop:
        with _worker(seeds, range(following, numbers.stop), seed) as (process, lines, last_words):
            begun: dict[str, Any] | None = None
            while following < numbers.stop:
                line = lines(START_SECONDS if begun is None else seconds)
                if line is None or line == "":
                    outcome = "hung" if line is None else f"died ({process.wait()})"
                    assert begun is not None, f"the worker {outcome} between two mutants: {last_words()}"
                    yield Result(begun["number"], begun["kind"], begun["how"], outcome, last_words())
                    following += 1
                    break
                told = json.loads(line)
                if "outcome" in told:
                    yield Result(**told)
                    following, begun = following + 1, None
                else:
                    begun = told


@contextmanager
def _worker(
    seeds: Path, numbers: range, seed: int
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[float], str | None], Callable[[], str]]]:
    """A worker, how to get its next line (None if none comes in so many seconds, empty if it has ended), and the end
    of what it printed."""
    command = [sys.executable, "-m", "tests.fuzzing", str(seeds), str(numbers.start), str(numbers.stop), str(seed)]
    # Standard input stays open and gives nothing: whoever asks a question there hangs, and is found out.
    reading, writing = os.pipe()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "FUZZ_REPORT": str(writing),
    }
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said, pass_fds=[writing]
        )
        os.close(writing)
        pending = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)

            def line(seconds: float) -> str | None:
                while b"\n" not in pending:
                    if not selector.select(seconds):
                        return None
                    got = os.read(reading, 65536)
                    if not got:
                        return ""
                    pending.extend(got)
                text, _, rest = bytes(pending).partition(b"\n")
                pending[:] = rest
                return text.decode()

            def last_words() -> str:
                said.seek(0)
                return said.read()[-2000:].decode(errors="replace")

            try:
                yield process, line, last_words
            finally:
                process.kill()
                process.wait()
                os.close(reading)


def _work(seeds: Path, numbers: range, seed: int) -> None:
    import torch

    from tests.fuzz_kinds import KINDS, make_seeds, schedule

    torch.set_num_threads(1)
    if not (seeds / "made").is_file():
        make_seeds(seeds)
    order = schedule()
    canary = seeds / "canary"
    with os.fdopen(int(os.environ["FUZZ_REPORT"]), "w", buffering=1) as report:
        _bound_memory()
        for number in numbers:
            rng = Random(f"{seed}:{number}")
            kind = order[number % len(order)]
            scratch = Path(tempfile.mkdtemp(prefix="mutant-", dir=seeds))
            try:
                case = KINDS[kind].prepare(seeds, scratch, rng, canary)
                begun: dict[str, Any] = {
                    "number": number,
                    "kind": kind,
                    "how": case.how[:200].encode("ascii", "replace").decode(),
                }
                print(json.dumps(begun), file=report)
                outcome, said = _outcome(case, canary)
                print(json.dumps(asdict(Result(**begun, outcome=outcome, said=said))), file=report)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def _outcome(case: Any, canary: Path) -> tuple[str, str]:
    from qdora.errors import QDoRAError

    before = _peak()
    try:
        case.read()
        outcome, said = ("silent" if case.fatal else "read"), ""
    except QDoRAError as error:
        outcome, said = "refused", f"{type(error).__name__}: {str(error)[:300]}"
        if len(str(error)) > 2000 or not str(error).strip():
            outcome = "escaped"
    except Exception:
        outcome, said = "escaped", traceback.format_exc()[-3000:]
    if canary.exists():
        canary.unlink()
        outcome = "ran code"
    if outcome in SOUND and _peak() - before > _GROWTH_BYTES:
        outcome = "grew"
    return outcome, said.encode("ascii", "replace").decode()


def _bound_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _ADDRESS_BYTES, resource.RLIM_INFINITY))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    _work(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4]))
