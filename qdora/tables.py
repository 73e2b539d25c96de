"""Tables and paragraphs for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = ["aligned", "wrapped"]

_LABEL = 16
_WIDTH = 100


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, cut at its start if the line were too long; the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    others = sum(width + 2 for width in widths[1:])
    widths[0] = min(max(widths[0], _LABEL), _WIDTH - others)
    lines = []
    for first, *rest in rows:
        name = first if len(first) <= widths[0] else f"…{first[1 - widths[0] :]}"
        cells = [f"{cell:>{width + 2}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(f"{name:<{widths[0]}}{''.join(cells)}".rstrip())
    return lines


def wrapped(text: str, label: str | None = None) -> list[str]:
    """A paragraph, beside its label if it has one."""
    first, rest = ("", "") if label is None else (f"{label:<{_LABEL}}", " " * _LABEL)
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
