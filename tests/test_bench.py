"""The measuring scripts run, on shapes too small to say anything, and write what a results file must hold."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_methods import METHODS, WORKLOADS, Workload, floor_flops
from bench_step import ratio

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(script: str, out: Path, *flags: str, threads: int | None = None) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPTS / script), *flags, "--out", str(out)]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    written: dict[str, Any] = json.loads(out.read_text())
    assert written["command"].startswith(f"python scripts/{script} ")
    assert {"date", "device", "threads", "python", "versions"} <= written.keys()
    return written


@pytest.mark.parametrize(
    "methods",
    [
        ["qdora QDoRA", "matmul floor"],
        pytest.param(
            ["qdora QDoRA", "qdora QDoRA, m frozen", "qdora QDoRA, own AdamW", "matmul floor", "QDoRA's operations"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bench_step(methods: list[str], tmp_path: Path) -> None:
    flags = ["--methods", *methods, "--rounds", "1", "--steps", "1", "--ranks", "4"]
    flags += ["--workloads", "tiny, 2 micro-batches of 32 tokens"]
    (result,) = run("bench_step.py", tmp_path / "step.json", *flags)["results"]
    assert result["tokens"] == 64
    assert list(result["median_seconds"]) == methods
    assert all(seconds > 0 for seconds in result["median_seconds"].values())
    peaks = result["peak_bytes_above_model"]
    assert peaks.keys() == set(methods) - {"matmul floor", "QDoRA's operations"}
    assert peaks.get("qdora QDoRA, m frozen", 0) < peaks["qdora QDoRA"] < peaks.get("qdora QDoRA, own AdamW", math.inf)
    assert (tmp_path / "step.png").stat().st_size > 0


@pytest.mark.slow
def test_memory_alone(tmp_path: Path) -> None:
    flags = ["--workloads", "tiny, 64 tokens", "--methods", "qdora QDoRA", "matmul floor", "--rounds", "0"]
    (result,) = run("bench_step.py", tmp_path / "step.json", *flags)["results"]
    assert result["median_seconds"] == {}
    assert list(result["peak_bytes_above_model"]) == ["qdora QDoRA"]


def test_a_ratio_is_of_what_ran_in_one_round() -> None:
    assert ratio([1.0, 20.0, 3.0], [2.0, 40.0, 3.0]) == 0.5


def test_bench_phases(tmp_path: Path) -> None:
    methods = ["qdora QLoRA", "qdora QDoRA, held", "qdora LoRA dense", "PEFT QDoRA", "dense, no adapters"]
    flags = ["--workload", "tiny, 64 tokens", "--methods", *methods, "--rounds", "2", "--rank", "4"]
    turns = run("bench_phases.py", tmp_path / "phases.json", *flags)["seconds"]
    assert list(turns) == methods
    for phases in turns.values():
        assert list(phases) == ["forward", "loss", "backward", "optimizer"]
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in phases.values())


def test_bench_linear(tmp_path: Path) -> None:
    flags = ["--in_features", "128", "--out_features", "192", "--tokens", "1", "5", "--rounds", "2"]
    table = run("bench_linear.py", tmp_path / "linear.json", *flags)["milliseconds_by_tokens"]
    assert list(table) == ["1", "5"]
    assert all(len(row) == 3 and min(row.values()) > 0 for row in table.values())


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("--together --only hold_outputs", 1),
        *(pytest.param(how, 9, marks=pytest.mark.slow) for how in ("--together", "")),
    ],
)
def test_the_estimate_is_true(how: str, count: int, tmp_path: Path) -> None:
    """Real training of a small model, by the script that holds the prediction to what was allocated."""
    flags = ["--shapes", "tiny", "--lengths", "1024", "--device", "cpu", *how.split()]
    # Each thread has scratch memory of its own, which is nothing beside a model, but much beside one as small as this.
    result = run("check_estimate.py", tmp_path / "estimate.json", *flags, threads=1)
    assert len(result["configurations"]) == count
    assert result["largest_error"] < 0.05


@pytest.mark.slow
def test_estimates_of_known_models(tmp_path: Path) -> None:
    flags = ["--models", "Mistral-7B", "--mixtures", "--memory", "8GB", "0.3GB"]
    result = run("estimate_models.py", tmp_path / "estimates.json", *flags)
    fits, does_not = result["plans"]
    assert fits["peak_gb"] < 8
    assert does_not["peak_gb"] is None
    assert "leaves nothing" in does_not["plan"]
    assert [row["peak_gb"] < 6 for row in result["one_row"]] == [True, True]


@pytest.mark.slow
def test_bench_stream(tmp_path: Path) -> None:
    flags = ["--workloads", "tiny, 64 tokens", "--rounds", "1", "--steps", "1", "--device", "cpu"]
    (result,) = run("bench_stream.py", tmp_path / "stream.json", *flags)["results"]
    assert list(result["methods"]) == ["resident", "streamed", "FSDP2 offloading"]
    assert result["same_loss"]


@pytest.mark.slow
def test_draw_memory(tmp_path: Path) -> None:
    result = run("draw_memory.py", tmp_path / "memory.json", "--workload", "tiny, 64 tokens")
    assert sum(result["reckoned"].values()) > result["loaded_model"]
    assert result["measured_above_model"].keys() == {"qdora QDoRA", "PEFT QLoRA", "PEFT QDoRA"}
    assert (tmp_path / "memory.png").stat().st_size > 0


def test_the_floor_counts_each_product_once() -> None:
    one = Workload(hidden=8, intermediate=16, layers=1, heads=2, kv_heads=2, vocabulary=32, batch=1, length=4)
    # q, k, v have no gradient of the first layer's input to make; o, gate, up, down and the head do.
    products = 2 * 3 * 8 * 8 + 3 * (8 * 8 + 3 * 8 * 16) + 2 * 8 * 32
    assert floor_flops(one) == 2 * 4 * products
    assert floor_flops(replace(one, micro_batches=3)) == 3 * floor_flops(one)
    assert "matmul floor" in METHODS
    assert "tiny, 64 tokens" in WORKLOADS
