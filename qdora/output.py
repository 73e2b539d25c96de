"""Outputs appear whole or not at all.

A directory is built beside its final place, flushed to disk and renamed into it in one step. Whatever interrupts the
work leaves no half-written directory under the final name; the unfinished one is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdora.errors import ConfigError

__all__ = ["check_output", "new_directory", "write_json"]


def check_output(out: str | Path, overwrite: bool) -> Path:
    """The output path, if it may be written; called before any long work.

    Raises:
        ConfigError: there is something in the way.
    """
    path = Path(out)
    if path.is_file():
        raise ConfigError(f"the output {path} is a file; name a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"the output directory {path} is not empty; choose another or pass --overwrite")
    return path


@contextmanager
def new_directory(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that becomes `out` when the block ends without an error.

    Raises:
        ConfigError: `out` holds something and `overwrite` is off, or it cannot be written.
    """
    path = check_output(out, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        yield scratch
        _flush(scratch)
        scratch.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        scratch.rename(path)
        _flush_one(path.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, sorted as given, with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(directory: Path) -> None:
    for entry in directory.rglob("*"):
        if entry.is_file():
            entry.chmod(0o644)
            _flush_one(entry)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
