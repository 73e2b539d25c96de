"""Peak memory by component: qdora as its estimate reckons it, beside what qdora and PEFT were measured to take.

    python scripts/draw_memory.py --out scripts/results/memory.json

The same shape, batch, rank and targets for all, on the CPU; the measured ones are the memory measurements of
`bench_step.py` (its AdamW, which keeps two bytes a value less than qdora's default) above the same loaded model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench_methods import METHODS, WORKLOADS, write_model
from bench_step import model_directory, run_child
from record import write_result

import qdora

MEASURED = ("qdora QDoRA", "PEFT QLoRA", "PEFT QDoRA")
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="8B-shaped, 2 layers, 1024 tokens", metavar="NAME")
    parser.add_argument("--models", type=Path, help="where the random models are kept [a temporary directory]")
    parser.add_argument("--out", type=Path, required=True, help="a .json file; a .png is drawn beside it")
    arguments = parser.parse_args()
    arguments.steps, arguments.device = 1, "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        arguments.models = arguments.models or Path(scratch)
        figures = gather(arguments)
    draw(figures, arguments.workload, arguments.out.with_suffix(".png"))
    write_result(arguments.out, {"workload": arguments.workload, "rank": RANK, **figures})


def gather(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parts that are reckoned, and the peaks that are measured, in bytes."""
    shape = WORKLOADS[arguments.workload]
    for method in MEASURED:
        write_model(shape, METHODS[method][1], model_directory(arguments.models, method, arguments.workload))
    directory = model_directory(arguments.models, MEASURED[0], arguments.workload)
    settings: dict[str, Any] = {
        "max_length": shape.length,
        "per_device_train_batch_size": shape.batch,
        "lora_r": RANK,
        "use_cpu": True,
    }
    need = qdora.estimate(directory, **settings).need
    loaded = sum(need.parts[name] for name in ("base weights", "embeddings and head", "norms and the rest"))
    above = {
        method: run_child(arguments, "memory", method, arguments.workload, RANK)["peak_bytes"] for method in MEASURED
    }
    return {"reckoned": need.parts, "moment": need.moment, "loaded_model": loaded, "measured_above_model": above}


def draw(figures: dict[str, Any], title: str, path: Path) -> None:
    """Stacked bars, the same loaded model at the bottom of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    bars = {"qdora QDoRA\nreckoned": figures["reckoned"]}
    for method, above in figures["measured_above_model"].items():
        bars[f"{method}\nmeasured"] = {"loaded model": figures["loaded_model"], "above it, measured": above}
    kinds = list(dict.fromkeys(kind for parts in bars.values() for kind in parts))
    colours = {kind: f"C{number}" for number, kind in enumerate(kinds)}
    colours |= {"loaded model": "#9aa5b1", "above it, measured": "#5c6770"}
    for place, (name, parts) in enumerate(bars.items()):
        bottom = 0.0
        for kind, size in parts.items():
            axes.bar(name, size / 1e6, bottom=bottom, color=colours[kind], label=kind, width=0.6)
            bottom += size / 1e6
        axes.text(place, bottom, f"{bottom:,.0f} MB", ha="center", va="bottom")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(ylabel="MB at the peak of a step", title=f"{title}, rank {RANK}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
