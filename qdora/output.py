"""Outputs appear whole or not at all.

A directory is built beside its final place, flushed to disk and renamed into it in one step; files that join a
directory are built in a scratch directory within it. Whatever interrupts the work leaves nothing half-written under a
final name. An error removes what is unfinished. A kill leaves it behind, and the next run with that output, alone there
by its lock, puts right what it finds: an old directory that had stepped aside comes back, scratch directories go.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qdora.errors import ConfigError, OutputError, QDoRAError, reason
from qdora.lock import locked

__all__ = [
    "SETTINGS_FILE",
    "TEMPLATES",
    "TEMPLATE_FILE",
    "TOKENIZER_FILES",
    "UNFINISHED",
    "check_file",
    "check_output",
    "flush",
    "new_directory",
    "put_in_place",
    "read_object",
    "replace_bytes",
    "replace_text",
    "save_tensors",
    "scratch_beside",
    "whole_files",
    "write_json",
    "writing",
]

UNFINISHED = ".unfinished"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
SETTINGS_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""What a tokenizer is stored in besides its template, by the names that transformers gives."""
# Directories in one that is a model's.
_A_MODEL_HAS = (TEMPLATES, "__pycache__")


def check_output(out: str | Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> Path:
    """The output path, if it may be written; called before any long work.

    Args:
        overwrite: a model directory that is there may be replaced. Anything else never is, nor one that holds other
            directories than a model's.
        inputs: what the work reads; `out` must be none of it, nor hold any of it.

    Raises:
        ConfigError: there is something in the way.
    """
    path = Path(out).resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the output {out} is a file; name a directory")
    if path.is_mount():
        raise ConfigError(f"{out} is where a disk is mounted, which cannot be renamed to; name a directory in it")
    for source in inputs:
        if path == Path(source).resolve() or path in Path(source).resolve().parents:
            raise ConfigError(f"the output {out} is or holds the input {source}; choose another directory")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ConfigError(f"the output directory {out} is not empty; choose another or pass --overwrite")
        if not _is_model(path):
            raise ConfigError(f"{out} is no model directory, so --overwrite does not replace it; choose another")
        if others := sorted(item.name for item in path.iterdir() if item.is_dir() and item.name not in _A_MODEL_HAS):
            raise ConfigError(f"{out} holds {others[0]}/, so --overwrite does not replace it; choose another")
    return path


def check_file(file: str | Path, flag: str, facts: Iterable[str] = ()) -> Path:
    """The path of a file to write, if it may be written; called before any long work.

    Args:
        flag: by which it is named.
        facts: names that a JSON file holds which is of the kind to be written, so that it may be replaced; without
            them any file may.

    Raises:
        ConfigError: its directory is missing or read-only, or something else than such a file is there.
    """
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a directory" if path.is_dir() else f"it is in {path.parent}, which is no directory"
        raise ConfigError(f"cannot write {file}: {what}; choose another {flag}")
    if path.exists() and not (path.is_file() and (path.stat().st_size == 0 or _holds(path, facts))):
        raise ConfigError(f"{file} is there already, and is no earlier one of its kind; choose another {flag}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; choose another {flag}") from None
    return path


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds by names; nothing if there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_model(path: Path) -> bool:
    return _holds(path / "config.json", ["model_type"])


def _holds(path: Path, names: Iterable[str]) -> bool:
    """Whether a JSON file holds an object with all these names; of no names, whatever it is."""
    wanted = set(names)
    return not wanted or wanted <= read_object(path).keys()


@contextmanager
def new_directory(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that becomes `out` when the block ends without an error.

    Raises:
        ConfigError: `out` holds something and `overwrite` is off, another run writes to it, or it cannot be written.
        OutputError: the disk is full, read-only or gone.
    """
    path = check_output(out, overwrite)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path.with_name(f".{path.name}.lock"), out))
            _recover(path)
            check_output(out, overwrite)
            scratch = scratch_beside(path)
        except OSError as error:
            raise ConfigError(f"cannot write to {path.parent}: {error.strerror}") from None
        try:
            with writing(out):
                yield scratch
                flush(scratch)
                check_output(out, overwrite)  # another program may have been here meanwhile
                put_in_place(scratch, path)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def scratch_beside(path: Path) -> Path:
    """A new directory that the next run with this output would remove, should this one be killed."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}{UNFINISHED}-", dir=path.parent))


def put_in_place(scratch: Path, path: Path) -> None:
    """The old directory steps aside and goes only when the new one stands, so that a kill never leaves neither."""
    aside = scratch.with_name(f"{scratch.name}-replaced")
    if path.exists():
        path.rename(aside)
    try:
        scratch.rename(path)
    except BaseException:
        if aside.exists():
            aside.rename(path)
        raise
    _flush_one(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _recover(path: Path) -> None:
    """What a killed run left beside its output; no living one does, for the lock is held."""
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}{UNFINISHED}-*")):
        if left.name.endswith("-replaced") and not path.exists():
            left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def whole_files(directory: Path, last: str | None = None) -> Iterator[Path]:
    """A scratch directory whose files go to `directory`, each whole, when the block ends without an error.

    Args:
        last: the file without which the others are nothing. If it says something else than before, it goes before they
            come, and it comes after them: a kill between two never leaves a mixture of sets that passes for one.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}-", dir=directory))
    try:
        yield scratch
        flush(scratch)
        if last is not None and _differ(scratch / last, directory / last):
            (directory / last).unlink(missing_ok=True)
            _flush_one(directory)
        for file in sorted(scratch.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.replace(directory / file.name)
        _flush_one(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _differ(new: Path, old: Path) -> bool:
    return not old.is_file() or old.read_bytes() != new.read_bytes()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, of which equal tensors and facts make equal bytes.

    safetensors writes the metadata's keys in an order that changes from process to process; here they are sorted.
    """
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same entries, and the blanks that fill up the header
        file.seek(8)
        file.write(text.ljust(length))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, its keys in their order; it appears whole, or the one that is there stays."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file that appears whole, or leaves the one that is there."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears whole, or leaves the one that is there."""
    scratch = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        scratch.write_bytes(content)
        _flush_one(scratch)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def writing(place: str | Path, then: str = "make room there, or choose another place") -> Iterator[None]:
    """Turns what libraries raise when they cannot write into one line.

    Args:
        then: what to do about it.

    Raises:
        OutputError: the disk is full, read-only or gone.
    """
    try:
        yield
    except QDoRAError:
        raise
    except Exception as error:
        why = _why_unwritten(error)
        if why is None:
            raise
        raise OutputError(f"cannot write {place}: {why}; {then}") from None


def _why_unwritten(error: Exception) -> str | None:
    """None if the error is about something else."""
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or reason(error)}{where}"
    told_by_rust = re.search(r"([^:]+) \(os error \d+\)", str(error))
    if told_by_rust is not None:
        return told_by_rust[1].strip()
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "torch could not write all of it, as if the disk were full"
    if isinstance(error, RuntimeError) and str(error).startswith("Parent directory"):
        return "its directory is gone"
    return None


def flush(directory: Path) -> None:
    """Put all that is in a scratch directory on the disk, to be read by others as any output is."""
    for entry in [*directory.rglob("*"), directory]:
        entry.chmod(0o644 if entry.is_file() else 0o755)
        _flush_one(entry)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
