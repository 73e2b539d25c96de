"""Damaged and hostile inputs, made from sound ones by a seeded random generator.

Each function takes a file's bytes and returns a `Mutant`: other bytes, in words what was done, and whether no reader
may take them for sound (`fatal`). What cannot be noticed without a hash of every byte, a flipped weight say, is not.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

__all__ = [
    "CANARY_CODE",
    "Mutant",
    "Payload",
    "mutate_bytes",
    "mutate_json",
    "mutate_safetensors",
    "mutate_text",
    "pickled",
]

CANARY_CODE = "open({path!r}, 'w').close()\n"


@dataclass(frozen=True)
class Mutant:
    """A damaged file."""

    content: bytes
    how: str
    fatal: bool = False
    """Whether to read it without an error is itself an error."""


class Payload:
    """Unpickling one creates the file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self._canary), "w")


def pickled(canary: Path) -> bytes:
    """What runs code when it is opened as torch's older files are."""
    return pickle.dumps({"weight": Payload(canary)})


def mutate_bytes(content: bytes, rng: Random) -> Mutant:
    """Cut, flip, repeat, insert or replace bytes, without a thought for what they mean."""
    if not content:
        return Mutant(rng.randbytes(8), "bytes where there were none")
    place, flipped = rng.randrange(len(content)), bytearray(content)
    kind = rng.choice(["cut", "flip", "flips", "insert", "drop", "zeros", "double", "empty"])
    if kind == "cut":
        return Mutant(content[:place], f"cut after {place} bytes")
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else rng.randint(2, 64)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return Mutant(bytes(flipped), kind)
    if kind == "insert":
        return Mutant(content[:place] + rng.randbytes(rng.randint(1, 64)) + content[place:], f"bytes put in at {place}")
    if kind == "drop":
        return Mutant(content[:place] + content[place + rng.randint(1, 64) :], f"bytes taken out at {place}")
    if kind == "zeros":
        return Mutant(content[:place] + bytes(len(content) - place), f"zeros from {place} on")
    return Mutant(content * 2 if kind == "double" else b"", kind)


_BOMBS: dict[str, Callable[[], str]] = {
    "deep lists": lambda: "[" * 100_000,
    "deep objects": lambda: '{"a":' * 100_000,
    "deep and closed": lambda: "[" * 50_000 + "]" * 50_000,
    "giant integer": lambda: "9" * 100_000,
    "giant float": lambda: "1e999999999",
    "giant text": lambda: '"' + "x" * 3_000_000 + '"',
    "giant key": lambda: '{"' + "k" * 3_000_000 + '": 1}',
    "many keys": lambda: "{" + ",".join(f'"k{i}":{i}' for i in range(50_000)) + "}",
    "not a number": lambda: "NaN",
    "half a surrogate": lambda: '"\\ud800"',
}
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 1.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "..", "../../etc/passwd", "/dev/zero", "\ud800", "\x00"),
    *("x" * 100_000, "(a+)+$", "(.*)*.*.*.*.*x", "[", [], {}, [[]], [None], {"a": {}}, ["x"] * 1000, [1e308] * 3),
    *("nf4", "fp4", "float16", "bfloat16", "complex64", "__class__", "lm_head", "{{ 1 }}"),
)


def mutate_json(content: bytes, rng: Random) -> Mutant:
    """Change the meaning of a JSON file: values, keys and their number, and what a parser chokes on."""
    if rng.random() < 0.2:
        return mutate_bytes(content, rng)
    try:
        tree = json.loads(content)
    except ValueError:
        return mutate_bytes(content, rng)
    if rng.random() < 0.2:
        name = rng.choice(list(_BOMBS))
        return Mutant(_with_bomb(tree, _BOMBS[name](), rng).encode("utf-8", "surrogatepass"), name)
    how = [_change(tree, rng) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
    if rng.random() < 0.05:
        return Mutant(json.dumps(rng.choice([[tree], [], None, "x", 3])).encode(), "another kind of JSON")
    return Mutant(json.dumps(tree).encode(), "; ".join(how))


def _with_bomb(tree: Any, bomb: str, rng: Random) -> str:
    """The bomb alone, or in some value's place."""
    if rng.random() < 0.3 or not isinstance(tree, dict) or not tree:
        return bomb
    owner, key = rng.choice(_places(tree))
    owner[key] = "\ufffcBOMB"
    return json.dumps(tree).replace('"\\ufffcBOMB"', bomb)


def _change(tree: Any, rng: Random) -> str:
    places = _places(tree)
    if not places:
        return "nothing to change"
    owner, key = rng.choice(places)
    shown = str(key)[:40]
    kind = rng.choice(["set", "set", "set", "number", "drop", "rename", "wrap"])
    if kind == "number" and isinstance(owner[key], int | float):
        owner[key] = rng.choice([-owner[key], owner[key] + 1, owner[key] * 2, owner[key] // 2, owner[key] * 10**9])
        return f"{shown} is {owner[key]!r:.40}"
    if kind == "drop":
        del owner[key]
        return f"{shown} is gone"
    if kind == "rename" and isinstance(owner, dict):
        owner[rng.choice(["x", "", "é" * 3, f"{shown}_", "__proto__"])] = owner.pop(key)
        return f"{shown} has another name"
    if kind == "wrap":
        owner[key] = rng.choice([[owner[key]], {"x": owner[key]}, str(owner[key])])
        return f"{shown} is wrapped"
    owner[key] = rng.choice(_VALUES)
    return f"{shown} is {owner[key]!r:.40}"


def _places(tree: Any, limit: int = 400) -> list[tuple[Any, Any]]:
    """(container, key) of values, the first few of them at each depth."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < limit:
        node = waiting.pop(0)
        items = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        for key, value in items[:60]:
            found.append((node, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    return found


def mutate_safetensors(content: bytes, rng: Random, canary: Path) -> Mutant:
    """Damage a safetensors file: its length, its header's text, one entry, its data, or its whole kind."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.choice(
        ["bytes", "length", "header", "entry", "entry", "entry", "entry", "data", "twice", "pickle", "cut"]
    )
    if kind == "bytes":
        return mutate_bytes(content, rng)
    if kind == "length":
        claimed = rng.choice([0, 1, 7, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1])
        return Mutant(struct.pack("<Q", claimed) + content[8:], f"a header of {claimed} bytes is claimed", fatal=True)
    if kind == "header":
        return Mutant(_framed(mutate_json(header, rng).content, data), "the header's JSON")
    if kind == "entry":
        return _entry(json.loads(header), data, rng)
    if kind == "data" and data:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 8, 512])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return Mutant(_framed(header, bytes(flipped)), "bits of the data")
    if kind == "twice":
        first = next(key for key in json.loads(header) if key != "__metadata__")
        entry = json.dumps({first: json.loads(header)[first]})[1:-1].encode()
        return Mutant(_framed(b"{" + entry + b"," + header.lstrip()[1:], data), "a key twice", fatal=True)
    if kind == "pickle":
        return Mutant(
            _torch_file(canary) if rng.random() < 0.5 else pickled(canary), "a pickle by that name", fatal=True
        )
    return Mutant(content[: rng.randrange(len(content))], "cut", fatal=True)


def _entry(header: dict[str, Any], data: bytes, rng: Random) -> Mutant:
    """One tensor's dtype, shape or place is changed so that it contradicts the rest."""
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry, size = header[key], len(data)
    start, stop = entry["data_offsets"]
    how, changed = rng.choice(
        [
            ("its end beyond the file", {"data_offsets": [start, size + 1 + rng.randrange(2**40)]}),
            ("its end before its start", {"data_offsets": [stop + 1, start]}),
            ("a negative offset", {"data_offsets": [-8, stop]}),
            ("offsets beyond 64 bits", {"data_offsets": [2**64 - 8, 2**64 + 8]}),
            ("another's bytes", {"data_offsets": [0, stop - start] if start else [size - 2, size]}),
            ("an absurd shape", {"shape": [2**40, 2**40]}),
            ("a shape that overflows to the right size", {"shape": [2**63, 2, *entry["shape"]]}),
            ("a negative shape", {"shape": [-1, *entry["shape"]]}),
            ("one row more", {"shape": [entry["shape"][0] + 1, *entry["shape"][1:]] if entry["shape"] else [2]}),
            ("an unknown dtype", {"dtype": rng.choice(["F12", "", "f16", "PICKLE", None, 7])}),
            ("a wider dtype", {"dtype": "F64" if entry["dtype"] != "F64" else "F32"}),
            ("no dtype", {"dtype": None}),
        ]
    )
    header[key] = entry | changed
    return Mutant(_framed(json.dumps(header).encode(), data), f"{key} has {how}", fatal=True)


def _framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _torch_file(canary: Path) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save({"weight": Payload(canary)}, file)
    return file.getvalue()


def mutate_text(content: bytes, rng: Random) -> Mutant:
    """Damage a text file of lines: JSON lines, CSV, YAML."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    kind = rng.choice(["bytes", "line", "swap", "latin", "zero", "bom", "quote", "long", "json", "json"])
    if kind == "bytes":
        return mutate_bytes(content, rng)
    if kind == "swap":
        lines[number], lines[0] = lines[0], lines[number]
    elif kind == "json":
        lines[number] = mutate_json(lines[number], rng).content
    else:
        lines[number] = {
            "line": b"",
            "latin": b"caf\xe9 " + lines[number],
            "zero": b"\x00" + lines[number],
            "bom": b"\xef\xbb\xbf" + lines[number],
            "quote": lines[number] + b'"',
            "long": lines[number] * 2000,
        }[kind]
    return Mutant(b"\n".join(lines), f"line {number + 1}: {kind}")
