"""Whether an adapter and a base belong together.

An adapter is a change of certain weights, and on others of the same shapes it computes something too. Names do not tell
weights apart. Three things do, and an adapter's file records what it can of each:

    hash      `shards.fingerprint` of the files that the base was loaded from
    source    the hash of the 16-bit files that an NF4 checkpoint was quantized from, which `quantize` leaves beside it
              together with the checkpoint's own hash, so that it says nothing of any other weights
    probe     what three of the adapted weights answer to one fixed input, sixteen numbers each

If hashes or sources meet, these are the same weights; and if the answers meet too, as they are rounded in the same way,
it is a right pair, and nothing is said. Different hashes do not make a wrong one: the same model in another dtype, by
other names or quantized by another tool has another hash. But rounding to NF4 moves the answers to the probe by a tenth
of their length, another dtype by a thousandth, and those of other weights have nothing to do with each other. So a pair
whose answers are further apart than half their length is refused, as is a base that an adapter is merged into already,
and what neither hash nor probe decides (a near
relative of the base, an adapter that records nothing) is said in one line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qdora.base import BaseWeight
from qdora.distributed import say_once
from qdora.errors import CheckpointError
from qdora.output import read_object
from qdora.shards import ShardReader, fingerprint

__all__ = [
    "MERGE_RECORD",
    "QUANTIZE_RECORD",
    "Ancestry",
    "Kinship",
    "ancestry_of",
    "answers_of",
    "kinship",
    "probed_paths",
]

QUANTIZE_RECORD, MERGE_RECORD = "qdora_quantize.json", "qdora_merge.json"
_VALUES, _APART, _ROUNDED = 16, 0.5, 0.04


@dataclass(frozen=True)
class Ancestry:
    """Which weights these are, as far as it is known."""

    hash: str | None = None
    source: str | None = None
    merged: tuple[str, ...] = ()
    """Hashes of the adapters' files that were merged into these weights."""
    probe: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By the path of a linear, its answers; of an adapter's base only."""

    def meets(self, other: Ancestry) -> bool:
        """Whether both come from the same files."""
        return bool({self.hash, self.source} & {other.hash, other.source} - {None})

    def metadata(self) -> dict[str, str]:
        """What an adapter's file records of its base."""
        known = {"qdora_base_hash": self.hash, "qdora_base_source": self.source}
        probe = {"qdora_base_probe": json.dumps(self.probe)} if self.probe else {}
        return {**{key: value for key, value in known.items() if value is not None}, **probe}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Ancestry:
        """What was recorded; a probe that is none counts as not recorded."""
        return cls(metadata.get("qdora_base_hash"), metadata.get("qdora_base_source"), probe=_probe_in(metadata))


def ancestry_of(directory: Path, reader: ShardReader) -> Ancestry:
    """That of a model's directory."""
    own, record = fingerprint(reader), read_object(directory / QUANTIZE_RECORD)
    source = record.get("source_hash") if record.get("hash") == own else None
    merged = record.get("merged") if record.get("hash") == own else read_object(directory / MERGE_RECORD).get("merged")
    hashes = (entry for entry in merged if isinstance(entry, str)) if isinstance(merged, list) else ()
    return Ancestry(own, source if isinstance(source, str) else None, tuple(hashes))


@dataclass(frozen=True)
class Kinship:
    """What is known of a pair."""

    right: bool | None
    """None if nobody can know."""
    text: str

    def settle(self, adapter: str | Path, base: str | Path | None, allow_other_base: bool) -> None:
        """Refuse a wrong pair; say of a doubtful one that it is.

        Raises:
            CheckpointError: the pair is wrong, and `allow_other_base` is off.
        """
        if self.right is False and not allow_other_base:
            raise CheckpointError(
                f"{adapter} was not trained on {base or 'this model'}: {self.text}; name its own base, or "
                "pass --allow_other_base (allow_other_base=True)"
            )
        if self.right is not True:
            say_once(f"{adapter} on {base or 'this model'}: {self.text}")


def kinship(
    trained: Ancestry,
    found: Ancestry,
    answers: Callable[[str], tuple[float, ...] | None],
    own_hash: Callable[[], str],
) -> Kinship:
    """What is known of an adapter and a base.

    Args:
        trained: what the adapter records.
        found: the base's own.
        answers: of the base's linear at a path; None if it cannot be asked.
        own_hash: that of the adapter's file.
    """
    if found.merged and own_hash() in found.merged:
        return Kinship(False, "it is merged into these weights already")
    given = {path: answers(path) for path in trained.probe}
    distances = {path: _distance(trained.probe[path], answer) for path, answer in given.items() if answer is not None}
    path, apart = max(distances.items(), key=lambda item: item[1], default=("", 0.0))
    if trained.meets(found):
        if apart > _ROUNDED:
            return Kinship(
                None,
                f"the same weights, but rounded in another way than those it was trained on ({path} is {apart:.0%} "
                "apart, by a probe): one of the two is in NF4",
            )
        return Kinship(True, "the weights that the adapter was trained on")
    if apart > _APART:
        return Kinship(
            False, f"the weights of {path} are others (by a probe, {apart:.0%} apart; the same ones in NF4 are 10%)"
        )
    if trained.hash is None:
        return Kinship(
            None,
            "the adapter does not record which weights it was trained on: they may be others, or these rounded in "
            "another way (what was trained in 4 bits belongs to an NF4 checkpoint)",
        )
    return Kinship(
        None,
        "these are not the files that the adapter was trained on; they may hold the same weights in another format, or "
        "a near relative's",
    )


def probed_paths(paths: Iterable[str]) -> list[str]:
    """The adapted linears whose answers are recorded: the first, the middle one and the last."""
    ordered = list(paths)
    return list(dict.fromkeys([ordered[0], ordered[len(ordered) // 2], ordered[-1]])) if ordered else []


@torch.no_grad()
def answers_of(weight: BaseWeight) -> tuple[float, ...]:
    """Sixteen outputs, spread over all, for the input cos(i²), whose phases are as good as random."""
    places = torch.arange(weight.in_features, dtype=torch.float64)
    x_TI = torch.cos(places * places).float()[None].to(weight.device)
    y_O = weight.linear(x_TI)[0].float().cpu()
    count = min(_VALUES, len(y_O))
    return tuple(float(f"{y_O[number * len(y_O) // count].item():.6g}") for number in range(count))


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """‖a − b‖ by the longer of both; 0 if both are zero, infinite if they cannot be compared."""
    if len(a) != len(b):
        return math.inf
    longer = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / longer if longer else 0.0


def _probe_in(metadata: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    try:
        raw: Any = json.loads(metadata.get("qdora_base_probe", "{}"))
        probe = {str(path): tuple(map(float, values)) for path, values in raw.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return probe if all(math.isfinite(value) for values in probe.values() for value in values) else {}
