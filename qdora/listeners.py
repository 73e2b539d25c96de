"""Output that nobody takes any more (a closed pipe, a terminal that is gone, a full disk) does not end a training.

`qdora train … | head` is such a pipe, and an `ssh` that is cut off leaves such a terminal. Python raises an error from
whichever `print` comes next, in the middle of a step or of a checkpoint. Here it is told once, to who still listens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["outlasting_listeners"]


class _Outlasting:
    """A text stream that goes on when what it writes to does not."""

    def __init__(self, stream: Any, name: str, other: Any) -> None:
        self._stream, self._name, self._other = stream, name, other
        self.lost = False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Any, *arguments: Any) -> None:
        if self.lost:
            return
        try:
            act(*arguments)
        except OSError as error:
            self.lost = True
            said = f"qdora: {self._name} takes nothing any more ({error.strerror}); the training goes on"
            with suppress(OSError):
                print(said, file=self._other, flush=True)

    def close_for_good(self) -> None:
        """Let the stream's descriptor lead nowhere, for whoever writes to it next."""
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outlasting_listeners() -> Iterator[None]:
    """Within it, standard output and standard error may be lost without harm. What was lost goes nowhere afterwards
    too, so that a training that succeeded ends as one."""
    before = sys.stdout, sys.stderr
    out, err = before
    if out is not None:
        sys.stdout = _Outlasting(out, "standard output", err)
    if err is not None:
        sys.stderr = _Outlasting(err, "standard error", out)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Outlasting) and stream.lost:
                stream.close_for_good()
        sys.stdout, sys.stderr = before
