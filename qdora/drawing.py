"""The picture of what training changed: ΔD against ΔM, and where in the model."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from qdora.analysis import LinearChange, by_kind, correlation

__all__ = ["draw_changes"]


def draw_changes(changes: Sequence[LinearChange], title: str) -> bytes:
    """A PNG: each linear as a point, coloured by its kind, and beside it two maps of layers × kinds of module.

    The maps show ΔM/‖W‖ and ΔD, means where a layer has several linears of a kind; they are left out if no linear is
    in a numbered layer.
    """
    from matplotlib.figure import Figure

    has_layers = any(change.layer is not None for change in changes)
    figure = Figure(figsize=(13, 5) if has_layers else (6, 5), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(1, 3, width_ratios=(2, 1, 1)) if has_layers else figure.add_gridspec(1, 1)
    _scatter(figure.add_subplot(grid[0, 0]), changes)
    if has_layers:
        _map(figure, figure.add_subplot(grid[0, 1]), changes, "ΔM / ‖W‖", lambda change: change.relative_delta_m)
        _map(figure, figure.add_subplot(grid[0, 2]), changes, "ΔD", lambda change: change.delta_d)
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    return png.getvalue()


def _scatter(axes: Any, changes: Sequence[LinearChange]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"]
    for number, (kind, members) in enumerate(by_kind(changes).items()):
        x, y = [change.delta_m for change in members], [change.delta_d for change in members]
        axes.scatter(x, y, s=18, alpha=0.8, label=kind, color=colours(2 * number % 20 + number // 10 % 2))
    value = correlation(changes)
    text = "too few to correlate, or no spread" if value is None else f"correlation {value:+.2f}"
    axes.set(xlabel="change of magnitude ΔM", ylabel="change of direction ΔD", title=text)
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _map(
    figure: Any, axes: Any, changes: Sequence[LinearChange], title: str, value: Callable[[LinearChange], float | None]
) -> None:
    kinds = list(by_kind(changes))
    layers = sorted({change.layer for change in changes if change.layer is not None})
    cells: dict[tuple[int, str], list[float]] = {}
    for change in changes:
        found = value(change)
        if change.layer is not None and found is not None:
            cells.setdefault((change.layer, change.kind), []).append(found)
    rows = [[_mean(cells.get((layer, kind), [])) for kind in kinds] for layer in layers]
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", origin="lower")
    axes.set_xticks(range(len(kinds)), kinds, rotation=90)
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set(ylabel="layer", title=title)
    bar = figure.colorbar(image, ax=axes)
    bar.formatter.set_powerlimits((-2, 3))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
