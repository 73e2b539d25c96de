"""Reading data files: rows as they stand, whatever their layout.

A row counts from 1, as editors do.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdora.errors import DataError

__all__ = ["Row", "held_out", "holds_half_a_pair", "parse_json", "read_rows"]

Row = dict[str, Any]


def read_rows(source: str | Path, split: str = "train", config: str | None = None) -> list[Row]:
    """The rows of a data file (.jsonl, .json, .csv, .parquet) or of a Hub data set's split.

    Args:
        split, config: of a Hub data set.

    Raises:
        DataError: missing, unreadable, empty, or of another kind; a bad line is named by its number.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise DataError(f"{path} is none of {', '.join(_READERS)}")
        try:
            rows = reader(path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    elif reader is not None or path.is_absolute() or str(source).startswith((".", "~")) or path.is_dir():
        raise DataError(f"no data file at {path}: name a {', '.join(_READERS)} file, or a data set on the Hub")
    else:
        rows = _read_hub(str(source), split, config)
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def held_out(count: int, percentage: float, seed: int) -> list[int]:
    """Which of so many rows are kept back to evaluate on: chosen at random by the seed, at least one, in order.

    Raises:
        DataError: no row would be left to train on.
    """
    kept_back = max(1, round(count * percentage / 100))
    if kept_back >= count:
        raise DataError(f"{count} rows cannot be parted: {kept_back} would be kept back to evaluate on; give more rows")
    return sorted(random.Random(seed).sample(range(count), kept_back))


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        DataError: it is none; `where` says whose.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None


def holds_half_a_pair(text: str) -> bool:
    """Whether a text holds a lone surrogate, which is no character: JSON can write one, and UTF-8 cannot."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_parse(line, f"{path}, line {number}"))
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] == "{" and not _is_one_object(text):
        return _read_jsonl(path)
    rows = parse_json(text, str(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must be a JSON list of objects, one a row")
    return rows


def _is_one_object(text: str) -> bool:
    """Over several lines, that is: one alone is a row of JSON lines."""
    try:
        return "\n" in text.strip() and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parse(line: str, where: str) -> Row:
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a document may well stand in one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = list(csv.DictReader(file, strict=True))
        except csv.Error as error:
            raise DataError(f"{path} is not valid CSV: {error}") from None
    for number, row in enumerate(rows, 1):
        if None in row:
            raise DataError(f"{path}, row {number}: more fields than the header has; put text with commas in quotes")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return [_without_nulls(row) for row in parquet.read_table(path).to_pylist()]
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not valid Parquet: {error}") from None


def _without_nulls(row: Row) -> Row:
    """Within columns, what is null is left out: Arrow gives each of a column's mappings the keys of all of them."""
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def _read_hub(name: str, split: str, config: str | None) -> list[Row]:
    from datasets import load_dataset

    try:
        return [_without_nulls(row) for row in load_dataset(name, config, split=split)]
    except Exception as error:
        # datasets raises a dozen kinds, from network errors to unknown splits
        said = " ".join(str(error).split()) or type(error).__name__
        advice = "; name one of its configs with --dataset_config" if "Config name is missing" in said else ""
        raise DataError(f"no data at {name}: not a file here, and the Hub gave none ({said[:500]}){advice}") from None


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
