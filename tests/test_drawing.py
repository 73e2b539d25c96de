"""The picture is a PNG, whatever the changes are."""

from __future__ import annotations

import pytest

from qdora.analysis import LinearChange
from qdora.drawing import draw_changes


def change(layer: int | None, kind: str, value: float, relative: float | None = 0.1) -> LinearChange:
    return LinearChange(f"l.{layer}.{kind}", kind, layer, 4, 8, 1.0, value, relative, value**2, 8, 8)


@pytest.mark.parametrize(
    "changes",
    [
        [change(layer, kind, layer + 0.1) for layer in range(40) for kind in ("q_proj", "up_proj")],
        [change(0, "q_proj", 0.0)],
        [change(None, "project_in", 1.0), change(None, "project_out", 2.0)],
        [change(None, "project_in", 1.0), change(3, "q_proj", 2.0, None), change(3, "q_proj", 2.5)],
        [change(0, f"kind_{number}", number / 7) for number in range(25)],
    ],
    ids=["layers", "one, and unmoved", "no layers", "holes", "many kinds"],
)
def test_it_is_a_png(changes: list[LinearChange]) -> None:
    png = draw_changes(changes, "a title")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 10_000
