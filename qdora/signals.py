"""SIGTERM, SIGHUP and SIGINT: work ends with nothing half-written, and a training with a checkpoint.

Python turns SIGINT into an exception, on whose way out scratch files are removed; here the others do the same. A
training asks for more: it finishes its step, saves, and then ends. In both a second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from qdora.distributed import is_main, processes

__all__ = ["StopRequest", "Stopped", "ending_cleanly"]

# A terminal that is closed, and `ssh` that is cut off, send SIGHUP; not everywhere is one.
_ENDING = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_SIGNALS = (*_ENDING, signal.SIGINT)
# A launcher passes a signal on that the terminal has sent to its processes too.
_ECHO_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """A signal ended the work, and what is on the disk is whole.

    Not an `Exception`, so that nothing between here and the command line takes it for a fault of its own.

    Args:
        number: of the signal.
        what: what became of the work, to end the sentence.
    """

    def __init__(self, number: int, what: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{what}")
        self.status = 128 + number


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Within it the first SIGTERM or SIGHUP raises `Stopped`, wherever the work is."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    before = {each: signal.signal(each, end) for each in _ENDING if _may_handle(each)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class StopRequest:
    """Whether a signal has asked this process to stop. Within it (a context manager), signals only ask."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that asked; 0 if none has."""
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {each: signal.signal(each, self._ask) for each in _SIGNALS if _may_handle(each)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._asked_at = number, now
            if is_main():
                name = signal.Signals(number).name
                # Not `print`: the signal may have come in the middle of one.
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, f"\nqdora: {name}: finishing this step, then saving; once more ends at once\n".encode())
        elif processes() == 1 or now - self._asked_at > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _may_handle(number: signal.Signals) -> bool:
    """Only the main thread may; and what was started to ignore a signal (`nohup`, a shell's `&`) goes on doing so."""
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) is not signal.SIG_IGN
