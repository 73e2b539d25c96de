"""One run at a time writes to an output: a file lock that dies with its process, however that ends.

The file is only something to lock. That it is there means nothing: a killed run leaves it, and the next one locks the
same file. Who lets go removes it; who finds that the file it locked is not the one that stands there any more tries
again with that one, or two runs might each hold a file of the same name. Processes that are forked off (a data loader's
workers) let go at once, so that none of them holds the lock after its parent was killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qdora.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]

_held: set[int] = set()


@contextmanager
def locked(file: Path, out: str | Path) -> Iterator[None]:
    """Hold the lock `file`, whose directory is made if need be, while `out` is written to.

    Raises:
        ConfigError: another run holds it.
        OSError: the file cannot be made there.
    """
    made = [directory for directory in file.parents if not directory.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(file, out)
    _held.add(handle)
    try:
        yield
    finally:
        with suppress(OSError):  # gone already, or read-only by now; what is left of it means nothing
            file.unlink()
        _held.discard(handle)
        os.close(handle)
        with suppress(OSError):  # what was made for nothing goes again; what holds something stays
            for directory in made:
                directory.rmdir()


def _lock(file: Path, out: str | Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 20).decode("ascii", "replace").strip()
            os.close(handle)
            raise ConfigError(
                f"another run{f' (process {owner})' if owner else ''} is writing to {out}; "
                "wait for its end or choose another directory"
            ) from None
        except OSError:
            pass  # a file system without locks: better unlocked than not at all
        if _stands(handle, file):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)


def _stands(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)
