"""What a training step costs: qdora beside PEFT and beside the bare matmuls, in time and memory.

    python scripts/bench_step.py                        # the CPU workloads, five rounds
    python scripts/bench_step.py --workloads "7B-shaped, 2 layers, 1024 tokens" --methods "qdora QDoRA" "PEFT QLoRA"

Each measurement is a process of its own. The methods take turns, round after round, so that a machine that slows down
slows all of them. Seconds are the median over the rounds of each process's median step; a ratio of two methods is the
median of their ratios in the single rounds, which a machine that changes from round to round disturbs less. Memory is
the most that torch's allocator held above the loaded base model (adapters, optimizer state and caches count), from the
profiler's record of each allocation on the CPU and `max_memory_allocated` on CUDA. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_methods import METHODS, WORKLOADS, Step, floor_flops, prepare, write_model
from record import most_allocated, synchronize, write_result

CPU_WORKLOADS = [name for name in WORKLOADS if name.startswith("SmolLM2") or "1024 tokens" in name]
OURS = "qdora QDoRA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=CPU_WORKLOADS, metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--rounds", type=int, default=5, help="0 measures memory alone")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after one to warm up")
    parser.add_argument("--models", type=Path, help="where the random models are kept [a temporary directory]")
    parser.add_argument("--out", type=Path, help="a .json file; a .png is drawn beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", choices=["time", "memory"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        arguments.models = arguments.models or Path(scratch)
        results = []
        for workload, rank in itertools.product(arguments.workloads, arguments.ranks):
            results.append(compare(arguments, workload, rank))
            if arguments.out:
                write(arguments, results)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own does: one method on one workload."""
    (method,), (name,), (rank,) = arguments.methods, arguments.workloads, arguments.ranks
    workload, device = WORKLOADS[name], torch.device(arguments.device)
    directory = write_model(workload, METHODS[method][1], model_directory(arguments.models, method, name))
    adapt = prepare(method, workload, directory, rank, device)
    if arguments.measure == "memory":
        return {"peak_bytes": peak_bytes(adapt, device)}
    step = adapt()
    step()
    gc.collect()
    gc.disable()  # the first full collection falls into whichever step it likes, and takes a fifth of a short one
    seconds = []
    for _ in range(arguments.steps):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds)}


def peak_bytes(adapt: Callable[[], Step], device: torch.device) -> int:
    """The most that was allocated at once, above what was before, while an adapter is attached and takes two steps."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run_twice(adapt)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run_twice(adapt)
    return most_allocated(profile)


def run_twice(adapt: Callable[[], Step]) -> None:
    step = adapt()
    step()
    step()


def compare(arguments: argparse.Namespace, workload: str, rank: int) -> dict[str, Any]:
    """All methods on one workload, in rounds."""
    print(f"\n{workload}, rank {rank}", flush=True)
    seconds: dict[str, list[float]] = {method: [] for method in arguments.methods}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}

    def measured(what: str, method: str) -> dict[str, Any] | None:
        """None if it fails, as one does that needs more memory than there is; it is not tried again."""
        try:
            return None if method in failed else run_child(arguments, what, method, workload, rank)
        except SystemExit as error:
            print(f"  {error}", flush=True)
            failed[method] = str(error).strip().rpartition("\n")[2]
            return None

    for method in arguments.methods:
        kind = METHODS[method][1]
        write_model(WORKLOADS[workload], kind, model_directory(arguments.models, method, workload))
    for number in range(arguments.rounds):
        for method in arguments.methods:
            if (found := measured("time", method)) is not None:
                seconds[method].append(found["seconds"])
        line = ", ".join(f"{method} {times[-1]:.3f}" for method, times in seconds.items() if method not in failed)
        print(f"  round {number + 1}: {line}", flush=True)
    for method in arguments.methods:
        if METHODS[method][0] in ("floor", "operations"):
            continue
        if (found := measured("memory", method)) is not None:
            peaks[method] = found["peak_bytes"]
    medians = {method: statistics.median(times) for method, times in seconds.items() if times}
    result = {
        "workload": workload,
        "rank": rank,
        "tokens": WORKLOADS[workload].tokens_a_step,
        "floor_tflop": floor_flops(WORKLOADS[workload]) / 1e12,
        "seconds": seconds,
        "median_seconds": medians,
        "peak_bytes_above_model": peaks,
        "failed": failed,
    }
    report(result)
    return result


def run_child(arguments: argparse.Namespace, what: str, method: str, workload: str, rank: int) -> dict[str, Any]:
    flags = ["--measure", what, "--methods", method, "--workloads", workload, "--ranks", str(rank)]
    flags += ["--steps", str(arguments.steps), "--models", str(arguments.models), "--device", arguments.device]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{method} on {workload} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(result: dict[str, Any]) -> None:
    """The table: seconds, tokens per second, MB, and what qdora QDoRA costs as a share of each."""
    seconds, peaks = result["seconds"], result["peak_bytes_above_model"]
    print(f"  {'method':<21} {'s/step':>8} {'tokens/s':>9} {'MB':>7}   QDoRA ÷ it: time, memory")
    for method, times in seconds.items():
        peak, median = peaks.get(method), result["median_seconds"].get(method)
        line = f"  {method:<21} "
        line += f"{median:8.3f} {result['tokens'] / median:9.0f} " if median else f"{'':19}"
        line += f"{peak / 1e6:7.0f}" if peak else f"{'':7}"
        if OURS in seconds:
            line += f"   {ratio(seconds[OURS], times):.3f}" if times and seconds[OURS] else f"   {'':5}"
            line += f", {peaks[OURS] / peak:.3f}" if peak and OURS in peaks else ""
        line += f"   failed: {result['failed'][method]}" if method in result["failed"] else ""
        print(line)


def ratio(ours: list[float], other: list[float]) -> float:
    """The median over the rounds of what one method took as a share of what the other did in the same round."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=False))  # one that failed has fewer


def write(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    write_result(arguments.out, {"results": results}, arguments.device)
    draw(results, arguments.out.with_suffix(".png"))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(results)), layout="constrained")
    for axes, result in zip(figure.subplots(len(results), 2, squeeze=False), results, strict=True):
        for axis, name, scale, decimals, unit in (
            (axes[0], "median_seconds", 1.0, 2, "seconds a step"),
            (axes[1], "peak_bytes_above_model", 1e-6, 0, "MB above the loaded model"),
        ):
            values = {method: value * scale for method, value in result[name].items()}
            colors = ["tab:blue" if method.startswith("qdora") else "tab:gray" for method in values]
            bars = axis.barh(list(values), list(values.values()), color=colors)
            axis.bar_label(bars, [f"{value:,.{decimals}f}" for value in values.values()], padding=3)
            axis.invert_yaxis()
            axis.set(xlabel=unit, title=f"{result['workload']}, rank {result['rank']}")
            axis.margins(x=0.15)
    figure.savefig(path, dpi=110)


def model_directory(models: Path, method: str, workload: str) -> Path:
    """Workloads of one shape share their models."""
    shape = workload.rpartition(", ")[0].replace(",", "").replace(" ", "-")
    return models / f"{shape}-{METHODS[method][1]}"


if __name__ == "__main__":
    main()
