"""`qdora inspect`: what an adapter is, and what training changed: magnitude and direction, by layer and by module.

The measures are those of DoRA's paper (see `analysis`). The base's weights are read from their files a tensor at a
time, as the adapter met them in training: a 16-bit base is rounded through NF4 if the adapter says that it was trained
on such weights. An adapter that began with more than zeros (with NF4's error, say) changed that much before training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdora.adapterfile import WEIGHTS_FILE, AdapterFile, read_adapter
from qdora.analysis import LinearChange, by_kind, change_of, correlation, correlations, kinds_of
from qdora.baseweights import StoredBase
from qdora.config import AdapterConfig
from qdora.distributed import bar
from qdora.drawing import draw_changes
from qdora.errors import CheckpointError, ConfigError
from qdora.output import check_file, replace_bytes
from qdora.shards import fingerprint, format_bytes
from qdora.sources import local_model
from qdora.tables import aligned, wrapped

__all__ = ["InspectReport", "inspect"]

_PICTURE_FILE = "inspect.png"
_MOST = 5
_NAMED = 10
_HASH_DIGITS = 16


@dataclass(frozen=True)
class InspectReport:
    """What an adapter is and what it changes."""

    adapter: str
    config: AdapterConfig
    values: int
    """How many it stores."""
    file_bytes: int
    trained_on: str | None
    """The base that the adapter names."""
    trained_kind: str | None
    """`AdapterFile.base_kind`: `nf4`, `nf4-custom` or `dense`; None if the adapter does not say."""
    trained_hash: str | None
    """`shards.fingerprint` of what it was trained on; None if the adapter does not say."""
    base: str
    """The base that it was compared with."""
    base_kind: str
    """`nf4`, `16-bit rounded through nf4` or `16-bit`: what that was read as."""
    base_hash: str
    base_is: str
    """What is known of the pair, see `kinship`."""
    right_base: bool | None
    changes: tuple[LinearChange, ...]
    """By linear, in the model's order."""
    picture: Path | None
    no_picture: str = ""
    """Why there is none."""

    @property
    def same_base(self) -> bool | None:
        """Whether the base is, by its fingerprint, the files that were trained on; None if the adapter does not say."""
        return None if self.trained_hash is None else self.trained_hash == self.base_hash

    @property
    def unmoved(self) -> list[str]:
        """The linears in which training changed nothing."""
        return [change.path for change in self.changes if not change.moved]

    @property
    def most_in_magnitude(self) -> list[LinearChange]:
        """The five that moved most by ΔM/‖W‖."""
        return _most((change for change in self.changes if change.magnitudes_moved), _relative)

    @property
    def most_in_direction(self) -> list[LinearChange]:
        """The five that moved most by ΔD."""
        return _most((change for change in self.changes if change.directions_moved), lambda change: change.delta_d)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        config = asdict(self.config)
        return {
            "adapter": self.adapter,
            "method": self._method(),
            "config": {**config, "target_modules": _listed(self.config.target_modules)},
            "values": self.values,
            "file_bytes": self.file_bytes,
            "trained_on": {"name": self.trained_on, "kind": self.trained_kind, "hash": self.trained_hash},
            "base": {"name": self.base, "kind": self.base_kind, "hash": self.base_hash},
            "same_base": self.same_base,
            "right_base": self.right_base,
            "base_is": self.base_is,
            "correlation": correlation(self.changes),
            "correlation_by_kind": correlations(self.changes),
            "most_in_magnitude": [change.path for change in self.most_in_magnitude],
            "most_in_direction": [change.path for change in self.most_in_direction],
            "unmoved": self.unmoved,
            "linears": [asdict(change) for change in self.changes],
            "picture": None if self.picture is None else str(self.picture),
        }

    def __str__(self) -> str:
        return "\n".join(
            [
                *self._facts(),
                "",
                *_kinds_table(self.changes),
                "",
                *_most_table("most in magnitude", self.most_in_magnitude),
                *_most_table("most in direction", self.most_in_direction),
                *self._unmoved(),
                "",
                *wrapped(
                    "ΔM: the mean over the outputs of |m − ‖W‖|, the change of magnitude"
                    + ("" if self.config.use_dora else " (m = ‖W + s·B·A‖)")
                    + "; ΔD: that of 1 − cos(W + s·B·A, W), the change of direction; r: their correlation over the "
                    "linears of a row (DoRA, arXiv 2402.09353, section 3.2)."
                ),
                *wrapped(f"picture: {self.picture}" if self.picture else f"no picture: {self.no_picture}"),
            ]
        )

    def _method(self) -> str:
        return ("DoRA" if self.config.use_dora else "LoRA") + (", rsLoRA's scaling" if self.config.use_rslora else "")

    def _facts(self) -> list[str]:
        config, targets = self.config, self.config.target_modules
        patterns = [
            f"{name} {value:g} in {pattern}"
            for name, values in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern))
            for pattern, value in values.items()
        ]
        method = [
            f"{self._method()}, rank {config.rank}, alpha {config.alpha:g}",
            *([_named(patterns)] if patterns else []),
        ]
        facts = {
            "adapter": self.adapter,
            "method": "; ".join(method),
            "targets": f"{targets if isinstance(targets, str) else _named(targets)}: {len(self.changes)} linears",
            "size": f"{self.values:,} values, A and B in {config.dtype}, {format_bytes(self.file_bytes)}",
            "trained on": f"{self.trained_on or 'not said'} ({self.trained_kind or 'kind not said'})",
            "its hash": self.trained_hash[:_HASH_DIGITS] if self.trained_hash else "not said",
            "compared with": f"{self.base} ({self.base_kind})",
            "base's hash": f"{self.base_hash[:_HASH_DIGITS]}: {self.base_is}",
        }
        return [line for label, text in facts.items() for line in wrapped(text, label)]

    def _unmoved(self) -> list[str]:
        unmoved = self.unmoved
        named = f": {_named(unmoved)}" if unmoved else ""
        lines = wrapped(f"{len(unmoved)} of {len(self.changes)} linears{named}", "did not move")
        for what, count in (
            ("magnitude", sum(change.moved and not change.magnitudes_moved for change in self.changes)),
            ("direction", sum(change.moved and not change.directions_moved for change in self.changes)),
        ):
            lines += wrapped(f"{count} more not in {what}") if count else []
        return lines


def inspect(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    picture: str | Path | None = None,
    trust_remote_code: bool = False,
) -> InspectReport:
    """Tell what an adapter is and what it changed, in magnitude and in direction.

    Args:
        adapter: an adapter directory, ours or PEFT's, DoRA or LoRA.
        base: the model to compare with, NF4 or 16-bit; by default the one that the adapter names.
        picture: the PNG to draw; by default `inspect.png` in the adapter's directory, if that can be written.

    Raises:
        CheckpointError: adapter or base is missing or damaged, or they do not belong together.
        ConfigError: the picture cannot be written where it was asked for.
        NumericsError: a weight is not finite.
    """
    target = _picture_file(picture)
    file = read_adapter(adapter)
    name, source = _find_base(adapter, file, base)
    stored = StoredBase(source, through_nf4=file.base_kind == "nf4", trust_remote_code=trust_remote_code)
    known = stored.kinship(file)
    changes = _changes(stored, file)
    title = f"{Path(adapter).resolve().name}: what training changed"
    drawn, no_picture = _draw(changes, title, target or Path(adapter) / _PICTURE_FILE, asked_for=target is not None)
    return InspectReport(
        adapter=str(adapter),
        config=file.config,
        values=sum(map(_values, file.linears.values())) + sum(weight.numel() for weight in file.whole.values()),
        file_bytes=(Path(adapter) / WEIGHTS_FILE).stat().st_size,
        trained_on=file.base_model,
        trained_kind=file.base_kind,
        trained_hash=file.base_hash,
        base=name,
        base_kind=stored.kind,
        base_hash=fingerprint(stored.reader),
        base_is=known.text,
        right_base=known.right,
        changes=changes,
        picture=drawn,
        no_picture=no_picture,
    )


def _find_base(adapter: str | Path, file: AdapterFile, base: str | Path | None) -> tuple[str, Path]:
    """The base's name and its directory."""
    if base is not None:
        return str(base), local_model(base)
    if not file.base_model:
        raise CheckpointError(f"{adapter} does not say which base it was trained on; name it with --base")
    try:
        return file.base_model, local_model(file.base_model)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {adapter} names it as its base, and --base names another place") from None


def _changes(stored: StoredBase, file: AdapterFile) -> tuple[LinearChange, ...]:
    keys = stored.adapted_keys(file)
    kinds = kinds_of(list(keys))
    pairs = bar("inspect", "linears")(keys.items())
    return tuple(change_of(path, kinds[path], stored.weight(key), file.linears[path]) for path, key in pairs)


def _picture_file(picture: str | Path | None) -> Path | None:
    """The file asked for, found fault with before the long work."""
    if picture is None:
        return None
    path = Path(picture)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"the picture is a PNG; name a file that ends in .png, found {str(picture)!r}")
    return check_file(path, "--picture")


def _draw(changes: Sequence[LinearChange], title: str, path: Path, asked_for: bool) -> tuple[Path | None, str]:
    """Where the picture is, or why there is none."""
    try:
        replace_bytes(path, draw_changes(changes, title))
    except OSError as error:
        if asked_for:
            raise ConfigError(f"cannot write the picture {path}: {error.strerror}; name another file") from None
        return None, f"{path} cannot be written ({error.strerror}); name a file with --picture"
    return path, ""


def _values(linear: Any) -> int:
    return sum(tensor.numel() for tensor in (linear.A, linear.B, linear.magnitude) if tensor is not None)


def _relative(change: LinearChange) -> float:
    return math.inf if change.relative_delta_m is None else change.relative_delta_m


def _most(changes: Iterable[LinearChange], key: Any) -> list[LinearChange]:
    return sorted(changes, key=key, reverse=True)[:_MOST]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _listed(targets: str | tuple[str, ...]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


def _kinds_table(changes: Sequence[LinearChange]) -> list[str]:
    rows = [("", "linears", "rank", "ΔM", "ΔM/‖W‖", "ΔD", "r", "magnitudes moved")]
    groups = by_kind(changes)
    if len(groups) > 1:
        groups["all"] = list(changes)
    for kind, members in groups.items():
        ranks = sorted({change.rank for change in members})
        relative = [change.relative_delta_m for change in members if change.relative_delta_m is not None]
        r, outputs = correlation(members), sum(change.outputs for change in members)
        moved = sum(change.magnitudes_moved for change in members) / outputs
        rows.append(
            (
                kind,
                str(len(members)),
                str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
                f"{_mean([change.delta_m for change in members]):.3g}",
                f"{_mean(relative):.3g}" if relative else "–",
                f"{_mean([change.delta_d for change in members]):.3g}",
                "–" if r is None else f"{r:+.2f}",
                f"{_percent(moved)} of {outputs:,}",
            )
        )
    return aligned(rows)


def _most_table(label: str, changes: Sequence[LinearChange]) -> list[str]:
    rows = [(label, "ΔM", "ΔM/‖W‖", "ΔD")]
    for change in changes:
        relative = "–" if change.relative_delta_m is None else f"{change.relative_delta_m:.3g}"
        rows.append((change.path, f"{change.delta_m:.3g}", relative, f"{change.delta_d:.3g}"))
    return [*aligned(rows if changes else [*rows, ("none moved", "", "", "")]), ""]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    """Never 100 % for less than all, nor 0 % for more than none."""
    text = f"{100 * share:.2f}"
    if (text == "100.00" and share < 1) or (text == "0.00" and share > 0):
        text = f"{'>' if share > 0.5 else '<'} {'99.99' if share > 0.5 else '0.01'}"
    return f"{text} %"
