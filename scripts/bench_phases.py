"""Where the time of a training step goes: forward (with the norm), loss, backward and optimizer, method beside method.

    python scripts/bench_phases.py                      # SmolLM2-135M, 512 tokens

All methods live in one process and take turns, a step each. What one takes longer than the first in a phase is the
median of the differences in the single turns: a machine whose speed changes from minute to minute changes less between
two neighbours. It sees differences that `bench_step.py`, with a process for each measurement, loses in the noise; but
the methods share an allocator here, and memory is not measured. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_methods import METHODS, WORKLOADS, Step, prepare, write_model
from bench_step import model_directory
from record import synchronize, write_result

PHASES = ("forward", "loss", "backward", "optimizer")
COMPARED = ["qdora QLoRA", "qdora QDoRA", "qdora QDoRA, held", "qdora QDoRA, m frozen"]


class Clock:
    """Tells which phase of a step took how long: called with the name of each as it begins, and "" at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._phase, self._began = device, dict.fromkeys(PHASES, 0.0), "", 0.0

    def __call__(self, phase: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] += now - self._began
        self._phase, self._began = phase, now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="SmolLM2-135M, 512 tokens", metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=COMPARED, metavar="NAME")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a .json file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        turns = take_turns(arguments, Path(scratch))
    report(turns)
    if arguments.out:
        figures = {"workload": arguments.workload, "rank": arguments.rank, "seconds": turns}
        write_result(arguments.out, figures, arguments.device)


def take_turns(arguments: argparse.Namespace, models: Path) -> dict[str, dict[str, list[float]]]:
    """Method → phase → seconds, one for each round."""
    device, workload = torch.device(arguments.device), WORKLOADS[arguments.workload]
    clock = Clock(device)
    steps: dict[str, Step] = {}
    for method in arguments.methods:
        directory = write_model(workload, METHODS[method][1], model_directory(models, method, arguments.workload))
        steps[method] = prepare(method, workload, directory, arguments.rank, device, clock)()
        steps[method]()
    gc.collect()
    gc.disable()
    turns: dict[str, dict[str, list[float]]] = {method: {phase: [] for phase in PHASES} for method in steps}
    for _ in range(arguments.rounds):
        for method, step in steps.items():
            clock.seconds = dict.fromkeys(PHASES, 0.0)
            step()
            for phase, seconds in clock.seconds.items():
                turns[method][phase].append(seconds)
    return turns


def report(turns: dict[str, dict[str, list[float]]]) -> None:
    """Milliseconds, and how many more than the first method's."""
    first = next(iter(turns))
    columns = [*PHASES, "step"]
    print(f"{'ms, and more than ' + first:<36}" + "".join(f"{column:>17}" for column in columns))
    whole = {
        method: {**phases, "step": [sum(turn) for turn in zip(*phases.values(), strict=True)]}
        for method, phases in turns.items()
    }
    for method, phases in whole.items():
        line = f"{method:<36}"
        for column, seconds in phases.items():
            more = difference(seconds, whole[first][column])
            line += f"{1e3 * statistics.median(seconds):9.0f} {1e3 * more:+7.0f}"
        print(line)


def difference(ours: list[float], other: list[float]) -> float:
    """The median over the rounds of what one took longer than the other."""
    return statistics.median(a - b for a, b in zip(ours, other, strict=True))


if __name__ == "__main__":
    main()
