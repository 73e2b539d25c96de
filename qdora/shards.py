"""Reading and writing sharded safetensors models one tensor at a time.

The bound. A reader never holds more than the tensor it was asked for: the file is opened for each one, because an open
safetensors file keeps every page that was touched mapped, and a 5 GB shard would grow to 5 GB of memory. A writer holds
one output shard. Neither ever holds the model.

Only safetensors is read. Pickled weights run code when they are opened.

The fingerprint. An adapter means nothing on other weights than its own, and names and configs do not tell weights
apart. A hash of every byte would, but reading 40 GB takes minutes. So the hash covers all names, dtypes and shapes,
small tensors whole, and of a large one windows spread over its length. Training, quantizing, merging or rounding
changes nearly every value of a tensor, and shows in every window; a few values changed between the windows, by accident
or on purpose, do not show. It tells which weights these are, not whether they are intact or to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qdora.errors import CheckpointError, ConfigError, reason, shown

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "ShardReader",
    "ShardWriter",
    "fingerprint",
    "format_bytes",
    "header_of",
    "parse_size",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Beginnings of the names of dtypes that are a code beside scales.
_WITH_SCALES = ("F8", "F6", "F4")
_WINDOWS, _WINDOW_BYTES = 16, 4096
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ShardReader:
    """The tensors of a model directory, read from disk when asked for.

    Args:
        directory: holds `model.safetensors`, or shards with `model.safetensors.index.json`; of both, transformers
            and we read the first.

    Raises:
        CheckpointError: no weights, only pickled ones, a shard missing, damaged or outside the directory, or an index
            that does not agree with its shards.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, Path] = {}
        self._bytes_of: dict[str, int] = {}
        named = self._read_index()
        for file in sorted(set(named.values())) if named else [self._single()]:
            self._read_header(file)
        missing = sorted(named.keys() - self._file_of.keys())
        if missing:
            raise CheckpointError(
                f"{self.directory / INDEX_FILE} names {len(missing)} tensors that its shards do not hold, "
                f"first {shown(missing[0])}; download the model again"
            )

    def _single(self) -> Path:
        path = self.directory / SINGLE_FILE
        if path.is_file():
            return path
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.directory.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self.directory} holds only pickled weights ({pickled[0]}), which run code when opened; "
                "convert the model to safetensors first"
            )
        raise CheckpointError(f"{self.directory} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE}")

    def _read_index(self) -> dict[str, Path]:
        path = self.directory / INDEX_FILE
        if not path.is_file() or (self.directory / SINGLE_FILE).is_file():
            return {}
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = {str(key): str(name) for key, name in weight_map.items()}
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{path} is not a safetensors index; download the model again") from None
        for name in set(names.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{path} names a shard outside its directory or of another kind: {shown(name)}")
            if not (self.directory / name).is_file():
                raise CheckpointError(f"{path} names {shown(name)}, which is not there; download the model again")
        return {key: self.directory / name for key, name in names.items()}

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    if key in self._file_of:
                        raise CheckpointError(f"{key!r} stands in both {self._file_of[key].name} and {path.name}")
                    part = file.get_slice(key)
                    if (dtype := part.get_dtype()).startswith(_WITH_SCALES):
                        raise CheckpointError(
                            f"{path} holds {key!r} in {dtype}, whose scales nothing tells; take the 16-bit original"
                        )
                    self._file_of[key] = path
                    self._bytes_of[key] = math.prod(part.get_shape()) * _bytes_per_value(dtype)
            header_of(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None

    def keys(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._file_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def nbytes(self, key: str) -> int:
        """The size of one tensor on disk."""
        return self._bytes_of[key]

    @property
    def total_bytes(self) -> int:
        return sum(self._bytes_of.values())

    def get(self, key: str) -> Tensor:
        """Read one tensor into memory of its own."""
        try:
            with safe_open(self._file_of[key], framework="pt") as file:
                # The clone lets go of the mapping, and of the pages it holds, as soon as the file is closed.
                return file.get_tensor(key).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {key!r} from {self._file_of[key]}: {reason(error)}") from None

    def get_all(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read several tensors, opening each file once: that takes long where a file holds a hundred thousand."""
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._file_of[key], []).append(key)
        for file, names in by_file.items():
            try:
                with safe_open(file, framework="pt") as content:
                    found |= {name: content.get_tensor(name).clone() for name in names}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"cannot read {names[0]!r} and others from {file}: {error}") from None
        return found

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._file_of.values()))


def fingerprint(reader: ShardReader) -> str:
    """SHA-256 over the model's tensors, as 64 hex digits: a name for these weights, whatever shards they lie in.

    Covers each tensor's name, dtype and shape and its bytes, in the order of the names: all of them up to 64 KiB,
    otherwise 16 windows of 4 KiB from its start to its end. See the top of this file for what that can tell.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    places = {key: place for file in reader.files() for key, place in _places(file).items()}
    for key, (file, entry, start, stop) in sorted(places.items()):
        # JSON between newlines: no two models have the same description.
        digest.update(f"{json.dumps([key, entry['dtype'], entry['shape']])}\n".encode())
        try:
            with file.open("rb") as content:
                for offset, count in _windows(stop - start):
                    content.seek(start + offset)
                    digest.update(content.read(count))
        except OSError as error:
            raise CheckpointError(f"cannot read {key!r} from {file}: {error}") from None
    return digest.hexdigest()


def _places(path: Path) -> dict[str, tuple[Path, dict[str, Any], int, int]]:
    """For each tensor of a file, which a `ShardReader` has checked: its header entry, and where its bytes are.

    The layout of safetensors: 8 bytes with the length of the header, the header in JSON, the tensors' bytes.
    """
    header, begin = header_of(path)
    header.pop("__metadata__", None)
    return {
        key: (path, entry, begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for key, entry in header.items()
    }


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file that the safetensors library has opened, and where the tensors' bytes begin.

    That library checks everything but one thing: of a name that stands there twice it takes the last entry in silence.

    Raises:
        CheckpointError: not readable, or a name twice.
    """
    try:
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            return json.loads(content.read(length), object_pairs_hook=_once), 8 + length
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What keeps a file from being read. Of one that may not be opened the safetensors library says there is none."""
    try:
        path.open("rb").close()
    except OSError as fault:
        return CheckpointError(f"cannot read {path}: {fault.strerror}; let it be read, or name another")
    return CheckpointError(f"{path} is damaged or cut short ({reason(error)}); download or write it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


def _windows(size: int) -> Iterator[tuple[int, int]]:
    """(offset, count) of what is hashed of a tensor of so many bytes."""
    if size <= _WINDOWS * _WINDOW_BYTES:
        yield 0, size
        return
    for number in range(_WINDOWS):
        yield number * (size - _WINDOW_BYTES) // (_WINDOWS - 1), _WINDOW_BYTES


class ShardWriter:
    """Writes tensors to shards of a bounded size, then an index if there is more than one.

    Use as a context manager; the names on disk follow Hugging Face (`model-00001-of-00003.safetensors`).
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        """Queue a tensor, on the CPU and contiguous; a full shard is written out."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._write()
        self._pending[key] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _write(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.directory / f"model.part-{number:05d}.safetensors"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._pending:
            self._write()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.directory / SINGLE_FILE)
            return
        weight_map = {}
        for number, keys in enumerate(self._shards):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.directory / name)
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parse_size(text: str | int) -> int:
    """Bytes in `5GB`, `200MiB` or `1000000`.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?i?B?)\s*", str(text), re.IGNORECASE)
    unit = match[2].upper() if match else None
    size = int(float(match[1]) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size <= 0:
        raise ConfigError(f"not a size: {text!r}; write it as 5GB, 200MB or 512MiB")
    return size


def format_bytes(count: float) -> str:
    """`1.23 GB`, in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _bytes_per_value(dtype: str) -> int:
    return {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}.get(
        dtype, 8 if dtype in ("I64", "U64", "F64") else 4
    )
