"""The loss picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["loss_series", "plot_loss"]


def loss_series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one entry (`loss`, `eval_loss`) in a trainer's log history."""
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(history: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """A PNG of training and evaluation loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        steps, values = loss_series(history, name)
        if steps:
            axes.plot(steps, values, style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    return png.getvalue()
