"""Two processes train as one: DDP and FSDP2, against a single process with the same global batch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qdora
from qdora.arguments import flags_of
from qdora.distributed import bar
from tests.conftest import make_model
from tests.test_numerics import POISON, rows, spoil

ROOT = Path(__file__).parents[1]
RUN: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "max_length": 64,
    "max_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
EXACT = {"dtype": "float32", "adapter_dtype": "float32"}
RESUMED = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def history(directory: Path, name: str = "loss") -> list[float]:
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_close(directory: Path, truth: Path) -> None:
    for name in ("loss", "grad_norm"):
        assert history(directory, name) == pytest.approx(history(truth, name), rel=1e-5)
    ours, theirs = tensors(directory), tensors(truth)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], rtol=1e-4, atol=1e-5), key


def assert_same_bits(directory: Path, other: Path) -> None:
    assert history(directory) == history(other)
    ours, theirs = tensors(directory), tensors(other)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of different lengths, so that processes have different numbers of tokens."""
    path = tmp_path_factory.mktemp("distributed") / "uneven.jsonl"
    rows = [{"prompt": f"{i} and {i + 1}?", "completion": f" {2 * i + 1}" + " 7" * (i % 5)} for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def common(tiny_nf4: Path, data: Path) -> dict[str, Any]:
    return {**RUN, "model_name_or_path": str(tiny_nf4), "dataset": str(data)}


@pytest.fixture(scope="module")
def runs(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of two processes, in one launch: a directory for each, and what it ended with in `results.json`."""
    out = tmp_path_factory.mktemp("runs")
    untied = make_model(tmp_path_factory.mktemp("untied") / "model", tie=False, hidden_size=72, num_hidden_layers=3)
    evaluated = {"eval_dataset": common["dataset"], "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    shard = {"fsdp": True}
    nan = make_model(tmp_path_factory.mktemp("nan") / "model", tie=False)
    spoil(nan, "model.embed_tokens.weight", float("nan"), qdora.load_tokenizer(nan)(POISON)["input_ids"][0])
    poison = {"model_name_or_path": str(nan), "dataset": str(rows(out / "poisoned.jsonl", bad={20}))}
    planned: dict[str, dict[str, Any]] = {
        "ddp": EXACT,
        "ddp_streamed": {**EXACT, "stream_base": True},
        "ddp_whole": RESUMED,
        "ddp_resumed": {**RESUMED, "resume_from_checkpoint": str(out / "ddp_whole" / "checkpoint-2")},
        "fsdp": {**EXACT, **shard},
        "fsdp_accumulated": {**EXACT, **shard, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "fsdp_best": {**EXACT, **shard, **evaluated, "save_strategy": "steps", "load_best_model_at_end": True},
        "fsdp_whole": {**RESUMED, **shard},
        "fsdp_half": {**RESUMED, **shard, "max_steps": 2, "output_dir": str(out / "fsdp_resumed")},
        "fsdp_resumed": {**RESUMED, **shard, "resume_from_checkpoint": "last"},
        "fsdp_from_ddp": {**RESUMED, **shard, "resume_from_checkpoint": str(out / "ddp_whole" / "checkpoint-2")},
        "ddp_stops": {**poison, "max_steps": 6},
        "fsdp_skips": {**poison, **shard, "max_steps": 6, "on_nonfinite": "skip"},
        "no_version_1": {"fsdp": True, "fsdp_config": {"version": 1}},
        "no_streaming": {**shard, "stream_base": True},
        "no_offloading": {"fsdp": True, "fsdp_config": {"cpu_offload": True}},
        "no_other_optimizer": {**shard, "optim": "adamw_8bit"},
        "no_other_class": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BloomBlock"]}},
    }
    plan = {name: {**common, "output_dir": str(out / name), **flags} for name, flags in planned.items()}
    file = out / "plan.json"
    file.write_text(json.dumps({"runs": plan, "untied": str(untied), "results": str(out / "results.json")}))
    done = launch("-m", "tests.processes", str(file))
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def alone(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single process with the batch that two have together."""
    out = tmp_path_factory.mktemp("alone")
    qdora.train(**{**common, **EXACT, "per_device_train_batch_size": 8, "output_dir": str(out)})
    return out


def results(runs: Path, name: str) -> list[Any]:
    return [each[name] for each in json.loads((runs / "results.json").read_text())]


@pytest.mark.parametrize("name", ["ddp", "ddp_streamed", "fsdp", "fsdp_accumulated"])
def test_two_processes_train_as_one(name: str, runs: Path, alone: Path) -> None:
    assert results(runs, name) == [4, 4]
    assert_close(runs / name, alone)
    assert {path.name for path in (runs / name).iterdir()} == {path.name for path in alone.iterdir()}
    assert not history(runs / name, "entropy")  # TRL's own loss, which scores every position, was not taken


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_resumed_run_is_the_uninterrupted_one(way: str, runs: Path) -> None:
    assert results(runs, f"{way}_resumed") == [4, 4]
    assert_same_bits(runs / f"{way}_resumed", runs / f"{way}_whole")


def test_a_checkpoint_fits_any_number_of_processes(common: dict[str, Any], runs: Path, tmp_path: Path) -> None:
    assert history(runs / "fsdp_from_ddp") == pytest.approx(history(runs / "ddp_whole"), rel=0.02)
    checkpoint = runs / "fsdp_whole" / "checkpoint-2"
    assert not list(checkpoint.glob("model*"))
    flags = {**RESUMED, "per_device_train_batch_size": 8, "resume_from_checkpoint": str(checkpoint)}
    qdora.train(**{**common, **flags, "output_dir": str(tmp_path)})
    assert history(tmp_path) == pytest.approx(history(runs / "fsdp_whole"), rel=0.02)


def test_evaluation_and_the_best_checkpoint(runs: Path, alone: Path) -> None:
    assert history(runs / "fsdp_best") == pytest.approx(history(alone), rel=1e-5)
    evaluated = history(runs / "fsdp_best", "eval_loss")
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]
    best = json.loads((runs / "fsdp_best" / "trainer_state.json").read_text())["best_model_checkpoint"]
    ours, theirs = tensors(runs / "fsdp_best"), tensors(Path(best))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_each_holds_half_and_the_norm_follows_the_shards(runs: Path) -> None:
    for inside in results(runs, "inside"):
        assert inside["packed"] == pytest.approx(inside["whole"] / 2, rel=0.02)
        assert inside["living"] < 0.6 * inside["whole"]  # nothing else holds the rest
        assert inside["called"] == []
        assert inside["gradients"]
        before, edited, refreshed = inside["losses"]
        assert edited != pytest.approx(before, rel=1e-3)
        assert edited == refreshed


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_version_1", "set fsdp_version to 2"),
        ("no_streaming", "choose one"),
        ("no_offloading", "CPU offloading is not supported"),
        ("no_other_optimizer", "use adamw_torch"),
        ("no_other_class", "the model's layers are LlamaDecoderLayer"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, says: str, runs: Path) -> None:
    for message in results(runs, name):
        assert says in message


def test_one_process_s_nan_stops_both_or_is_left_out_by_both(runs: Path) -> None:
    """The row is one process's; what it was is known to both."""
    first, second = results(runs, "ddp_stops")
    assert first == second
    assert "is not finite, first in the output of model.embed_tokens; the step was not applied" in first
    assert not (runs / "ddp_stops" / "adapter_model.safetensors").exists()
    assert results(runs, "fsdp_skips") == [6, 6]
    assert all(tensor.isfinite().all() for tensor in tensors(runs / "fsdp_skips").values())
    assert sum(history(runs / "fsdp_skips", "steps_left_out")) == 1
    assert "1 of 6 steps left out" in (runs / "fsdp_skips" / "report.md").read_text()


def test_one_process_cannot_shard(common: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(qdora.ConfigError, match="launch with torchrun"):
        qdora.train(**{**common, "fsdp": True, "output_dir": str(tmp_path)})


def test_the_command_line_and_the_merged_model(
    common: dict[str, Any], alone: Path, tmp_path: Path, tiny_nf4: Path
) -> None:
    flags = flags_of({**common, **EXACT, "output_dir": str(tmp_path / "adapter")})
    done = launch("-m", "qdora", "train", *flags, "--fsdp", "full_shard auto_wrap")
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == len(set(lines))  # the main process speaks alone
    assert sum("sharded over them (FSDP2)" in line for line in lines) == 1
    assert lines[-1].startswith("      qdora merge")
    assert_close(tmp_path / "adapter", alone)
    merged = []
    for adapter, out in ((tmp_path / "adapter", tmp_path / "merged"), (alone, tmp_path / "merged_alone")):
        qdora.merge(tiny_nf4, adapter, out, verify=False)
        merged.append({key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()})
    for key, tensor in merged[0].items():
        assert torch.allclose(tensor.float(), merged[1][key].float(), rtol=2e-3, atol=1e-4), key


def test_a_signal_to_the_launcher_ends_all_with_one_checkpoint(common: dict[str, Any], tmp_path: Path) -> None:
    flags = flags_of({**common, "max_steps": 500, "output_dir": str(tmp_path / "out")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen([*command, "-m", "qdora", "train", *flags], env=environment, stdout=log, stderr=log)
        while "step 2 of" not in (tmp_path / "log").read_text() and started.poll() is None:
            time.sleep(0.1)
        started.terminate()
        started.wait(60)
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("qdora: stopped")]
    assert len(said) == 1
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"saved as {checkpoint}; the same command goes on from there" in said[0]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}


def test_a_fault_in_the_data_ends_all_with_one_line(common: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "completion": "y"}\n' * 8 + '{"prompt": "x"}\n')
    flags = flags_of({**common, "dataset": str(bad), "output_dir": str(tmp_path / "out")})
    done = launch("-m", "qdora", "train", *flags)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("qdora: ")]
    assert len(said) == 1
    assert "row 9: the field 'completion' is missing" in said[0]
    assert "DataError" not in done.stderr  # no traceback of ours; the launcher adds its own


@pytest.mark.parametrize(("rank", "on_terminal", "shown"), [("0", True, True), ("0", False, False), ("1", True, False)])
def test_bars_are_the_main_process_s_and_for_terminals(
    rank: str, on_terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: on_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    assert list(bar("tokenize", "rows")([1, 2])) == [1, 2]
    assert ("tokenize" in stream.getvalue()) == shown
