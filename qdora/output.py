"""Outputs appear whole or not at all.

A directory is built beside its final place, flushed to disk and renamed into it in one step. Whatever interrupts the
work leaves no half-written directory under the final name; the unfinished one is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdora.errors import ConfigError

__all__ = ["check_output", "new_directory", "replace_text", "write_json"]


def check_output(out: str | Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> Path:
    """The output path, if it may be written; called before any long work.

    Args:
        overwrite: a model directory that is there may be replaced. Anything else never is.
        inputs: what the work reads; `out` must be none of it, nor hold any of it.

    Raises:
        ConfigError: there is something in the way.
    """
    path = Path(out).resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the output {out} is a file; name a directory")
    for source in inputs:
        if path == Path(source).resolve() or path in Path(source).resolve().parents:
            raise ConfigError(f"the output {out} is or holds the input {source}; choose another directory")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ConfigError(f"the output directory {out} is not empty; choose another or pass --overwrite")
        if not (path / "config.json").is_file():
            raise ConfigError(f"{out} is no model directory, so --overwrite does not replace it; choose another")
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
        _put_in_place(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _put_in_place(scratch: Path, path: Path) -> None:
    """The old directory steps aside and goes only when the new one stands, so that a kill never leaves neither."""
    aside = scratch.with_name(f"{scratch.name}-replaced")
    if path.exists():
        path.rename(aside)
    scratch.rename(path)
    _flush_one(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, sorted as given, with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write a text file that appears whole, or leaves the one that is there."""
    scratch = path.with_name(f".{path.name}.unfinished")
    scratch.write_text(text, encoding="utf-8")
    _flush_one(scratch)
    scratch.replace(path)


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
