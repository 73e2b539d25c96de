"""What training changes when the magnitude, the direction or neither is frozen: three runs, and `inspect` of each.

    python scripts/measure_parts.py BASE DATA.jsonl [--steps 30]

What one expects: with the magnitude frozen ΔM is 0 and ΔD is not; with the direction frozen ΔD is 0 and ΔM is not; with
both trained neither is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import write_result

import qdora

RUNS: dict[str, dict[str, Any]] = {
    "magnitude frozen": {"freeze": "magnitude"},
    "direction frozen": {"freeze": "direction"},
    "both trained": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="an NF4 checkpoint")
    parser.add_argument("data", help="training rows")
    parser.add_argument("--eval_data", required=True, help="held-out rows")
    parser.add_argument("--eval_rows", type=int, default=48)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--keep", action="store_true", help="measure the adapters that are there, if there are any")
    parser.add_argument("--out", type=Path, default=Path("runs/parts"))
    parser.add_argument("--results", type=Path, default=Path("runs/parts/parts.json"))
    arguments = parser.parse_args()
    figures = {}
    for name, flags in RUNS.items():
        print(f"\n{name}")
        out = arguments.out / name.replace(" ", "-")
        if not (arguments.keep and (out / "adapter_config.json").is_file()):
            train(arguments.base, arguments.data, out, arguments.steps, flags)
        report = qdora.inspect(out)
        print(report)
        measured = qdora.evaluate(
            arguments.base, arguments.eval_data, adapter=out, max_rows=arguments.eval_rows, exact_match_rows=0
        )
        found = report.to_dict()
        figures[name] = {
            "eval_loss": {kind: model.loss for kind, model in measured.models.items()},
            "mean_relative_delta_m": mean(linear["relative_delta_m"] for linear in found["linears"]),
            "mean_delta_d": mean(linear["delta_d"] for linear in found["linears"]),
            "correlation": found["correlation"],
            "unmoved_magnitudes": sum(linear["magnitudes_moved"] == 0 for linear in found["linears"]),
            "unmoved_directions": sum(linear["directions_moved"] == 0 for linear in found["linears"]),
            "linears": len(found["linears"]),
        }
    print(table(figures))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    write_result(arguments.results, {"steps": arguments.steps, "runs": figures}, device)


def train(base: str, data: str, out: Path, steps: int, flags: dict[str, Any]) -> None:
    qdora.train(
        model_name_or_path=base,
        dataset=data,
        output_dir=str(out),
        overwrite_output_dir=True,
        max_steps=steps,
        per_device_train_batch_size=8,
        max_length=256,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        **flags,
    )


def mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def table(figures: dict[str, Any]) -> str:
    lines = [f"\n{'':<18}{'loss':>8}{'ΔM/‖W‖':>11}{'ΔD':>11}{'r':>7}   linears whose magnitude, direction stood still"]
    for name, run in figures.items():
        r = run["correlation"]
        lines.append(
            f"{name:<18}{run['eval_loss']['adapter']:>8.4f}{run['mean_relative_delta_m']:>11.2e}"
            f"{run['mean_delta_d']:>11.2e}{'–' if r is None else f'{r:+.2f}':>7}   "
            f"{run['unmoved_magnitudes']}, {run['unmoved_directions']} of {run['linears']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
