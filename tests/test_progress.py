"""What is seen of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qdora.progress import Progress, Speedometer, describe
from tests.test_train import quick


def state(step: int, main: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=4, is_world_process_zero=main)


def play(progress: Progress, main: bool = True) -> None:
    progress.on_train_begin(None, state(0, main), None)
    progress.on_step_end(None, state(1, main), None)
    progress.on_log(None, state(1, main), None, logs={"loss": 2.5, "tokens_per_second": 1234.0, "memory_gb": 3.25})
    progress.on_log(None, state(1, main), None, logs={"epoch": 1})
    progress.on_prediction_step(None, state(1, main), None, eval_dataloader=[1, 2])
    progress.on_evaluate(None, state(1, main), None, metrics={"eval_loss": 1.0, "eval_perplexity": 2.718})
    progress.on_train_end(None, state(4, main), None)


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(bar=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1 of 4: loss 2.5000, 1,234 tokens/s, 3.25 GB, 00:0")
    assert lines[0].endswith(" left")
    assert lines[1:] == ["step 1: evaluation loss 1.0000, perplexity 2.72"]


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    play(Progress(bar=True))
    error = capsys.readouterr().err
    assert "1/4" in error
    assert "loss 2.5000, 1,234 tokens/s, 3.25 GB" in error
    assert "step 1: evaluation loss 1.0000" in error


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(bar=True), main=False)
    assert capsys.readouterr() == ("", "")


def test_tokens_are_counted_without_padding() -> None:
    speed = Speedometer(torch.device("cpu"), processes=2)
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    speed.count({"input_ids": ids, "attention_mask": mask})
    speed.count({"input_ids": ids})
    assert int(speed._tokens) == 18
    first = speed.read()
    assert first["tokens_per_second"] > 0
    assert first["memory_gb"] > 0
    assert speed.read()["tokens_per_second"] == 0


def test_speed_is_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loading nor evaluations nor checkpoints make it less."""
    now = 0.0
    monkeypatch.setattr("qdora.progress.time", SimpleNamespace(perf_counter=lambda: now))
    speed = Speedometer(torch.device("cpu"))

    def step(seconds: float) -> None:
        nonlocal now
        now += seconds
        speed.count({"input_ids": torch.ones(1, 10)})
        speed.on_step_end(None, None, None)

    def pause() -> None:
        nonlocal now
        for event in (speed.on_evaluate, speed.on_save):
            now += 50
            event(None, None, None)

    now += 100
    speed.on_train_begin(None, None, None)
    pause()
    step(2)
    pause()
    step(3)
    assert speed.read()["tokens_per_second"] == 4
    pause()
    step(5)
    assert speed.read()["tokens_per_second"] == 2


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_what_is_evaluated_counts_for_nothing(
    tiny_nf4: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a loss that the evaluation has in common with the training."""
    counted: list[int] = []
    monkeypatch.setattr(Speedometer, "count", lambda self, inputs: counted.append(len(inputs["input_ids"])))
    flags = {"eval_dataset": str(pairs_file), "eval_steps": 1, "label_smoothing_factor": 0.1, "save_strategy": "no"}
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=2, load_best_model_at_end=False, **flags)
    assert counted == [8, 8]


def test_only_what_is_there_is_described() -> None:
    assert describe({"loss": 1.0, "grad_norm": 2.0}) == "loss 1.0000"
    assert describe({"eval_exact_match": 0.125}) == "exact match 12.5%"


def test_a_run_reports_its_speed(
    tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=2, save_strategy="no")
    assert "tokens/s" in capsys.readouterr().out
    header = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert header[:3] == ["step", "epoch", "loss"]
    assert {"tokens_per_second", "memory_gb", "learning_rate"} <= set(header)
