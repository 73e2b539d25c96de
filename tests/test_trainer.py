"""What the trainer is told: evaluation token by token, the best kept, rates for each part."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qdora
from qdora import ConfigError, DataError
from qdora.groups import Rates
from qdora.trainer import AdapterTrainer
from tests.test_train import adapter_tensors, quick


def log_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_data_to_evaluate_on_is_used(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Nothing more need be said: an evaluation an epoch, a checkpoint with each, the best adapter kept."""
    report = quick(tiny_nf4, pairs_file, tmp_path, num_train_epochs=2, eval_dataset=str(pairs_file))
    evaluations = [row for row in log_of(tmp_path) if row["eval_loss"]]
    assert [row["step"] for row in evaluations] == ["6", "12"]
    assert report.eval_loss == min(float(row["eval_loss"]) for row in evaluations)
    assert float(evaluations[0]["eval_perplexity"]) > float(evaluations[1]["eval_perplexity"])
    assert f"(the best, of step {report.best_step}, was kept)" in str(report)


def test_the_best_is_kept_and_a_run_that_gets_worse_is_stopped(
    tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"validation_split_percentage": 25, "early_stopping_patience": 2, "learning_rate": 0.3, "max_grad_norm": 0}
    report = quick(tiny_nf4, pairs_file, tmp_path, max_steps=40, eval_steps=1, **flags)
    losses = [float(row["eval_loss"]) for row in log_of(tmp_path) if row["eval_loss"]]
    assert report.steps < 40
    assert report.best_step == 1 + losses.index(min(losses)) == report.steps - 2
    assert report.eval_loss == min(losses)
    best = adapter_tensors(tmp_path / f"checkpoint-{report.best_step}")
    assert all(torch.equal(tensor, best[key]) for key, tensor in adapter_tensors(tmp_path).items())
    out = capsys.readouterr().out
    assert "36 rows in the prompt/completion layout" in out
    assert "12 rows in the prompt/completion layout" in out


def test_evaluation_does_not_depend_on_its_batches(tiny_nf4: Path, tmp_path: Path) -> None:
    data = tmp_path / "uneven.jsonl"
    rows = [{"prompt": "count:", "completion": " 1" * (1 + 5 * (i % 4))} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = set()
    for size in (1, 3, 10):
        flags = {"eval_dataset": str(data), "per_device_eval_batch_size": size, "dtype": "float32"}
        report = quick(tiny_nf4, data, tmp_path / str(size), max_steps=1, learning_rate=0.0, **flags)
        assert report.eval_loss is not None
        losses.add(round(report.eval_loss, 4))
    assert len(losses) == 1


def test_no_row_is_dropped_from_an_evaluation(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"validation_split_percentage": 10, "max_steps": 2, "eval_steps": 1, "per_device_eval_batch_size": 8}
    report = quick(tiny_nf4, pairs_file, tmp_path / "drops", **flags, dataloader_drop_last=True)
    assert report.eval_loss == quick(tiny_nf4, pairs_file, tmp_path / "all", **flags).eval_loss
    assert report.eval_loss is not None
    assert report.eval_loss > 1


def test_what_weighs_tokens_by_their_probability_is_measured_by_it(
    tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    flags = {"eval_dataset": str(pairs_file), "max_steps": 1, "learning_rate": 0.0, "dtype": "float32"}
    losses = [quick(tiny_nf4, pairs_file, tmp_path / t, **flags, loss_type=t).eval_loss for t in ("nll", "dft")]
    assert losses[0] == losses[1]


def test_exact_match_while_training(tiny_nf4: Path, tmp_path: Path) -> None:
    data = tmp_path / "same.jsonl"
    data.write_text('{"prompt": "Question: 7?", "completion": " 7"}\n' * 16)
    flags = {"eval_dataset": str(data), "eval_exact_match": 3, "metric_for_best_model": "exact_match", "eval_steps": 15}
    report = quick(tiny_nf4, data, tmp_path / "out", max_steps=30, **flags)
    entries = [row for row in log_of(tmp_path / "out") if row["eval_exact_match"]]
    assert float(entries[-1]["eval_exact_match"]) == 1.0
    assert report.best_step is not None
    assert "| 100.0% |" in (tmp_path / "out" / "report.md").read_text()
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The quick brown fox"}\n' * 4)
    with pytest.raises(DataError, match="no questions with answers to match"):
        quick(tiny_nf4, text, tmp_path / "text", eval_dataset=str(text), eval_exact_match=3)


def test_questions_that_the_model_has_no_room_for(
    tiny_nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = ({"prompt": f"Question: {'7' * length}?", "completion": " 7"} for length in (1, 600))
    mixed, all_long = tmp_path / "mixed.jsonl", tmp_path / "long.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [long, short, short]))
    all_long.write_text(json.dumps(long) + "\n")
    flags: dict[str, Any] = {"eval_exact_match": 3, "max_steps": 1}
    quick(tiny_nf4, mixed, tmp_path / "mixed", eval_dataset=str(mixed), **flags)
    assert "1 of 3 questions are left out: they do not fit into what the model takes" in capsys.readouterr().out
    with pytest.raises(DataError, match="no question that, with its answer, fits into the 512 tokens"):
        quick(tiny_nf4, mixed, tmp_path / "long", eval_dataset=str(all_long), max_length=700, **flags)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_exact_match_under_another_loss(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {
        "validation_split_percentage": 25,
        "eval_exact_match": 2,
        "eval_steps": 2,
        "max_steps": 2,
        "label_smoothing_factor": 0.1,
        "metric_for_best_model": "exact_match",
    }
    report = quick(tiny_nf4, pairs_file, tmp_path, **flags)
    assert report.best_step == 2
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["eval_exact_match"] for entry in state["log_history"] if "eval_loss" in entry] == [0.0]


@pytest.mark.parametrize(
    ("metric", "flags", "message"),
    [
        ("exact_match", {}, r"exact_match needs --eval_exact_match"),
        ("accuracy", {}, r"must be one of loss, perplexity, exact_match, found 'accuracy'"),
        ("perplexity", {"router_aux_loss_coef": 0.01}, r"must be one of loss, exact_match, found 'perplexity'"),
        ("eval_perplexity", {"label_smoothing_factor": 0.1}, r"must be one of loss, exact_match, found 'perplexity'"),
    ],
)
def test_a_metric_that_is_never_measured(
    metric: str, flags: dict[str, Any], message: str, tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    flags = {**flags, "validation_split_percentage": 25, "metric_for_best_model": metric}
    with pytest.raises(ConfigError, match=message):
        quick(tiny_nf4, pairs_file, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "sgd"])
def test_a_rate_of_zero_keeps_the_magnitudes(optim: str, tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=2, optim=optim, magnitude_learning_rate=0.0, save_strategy="no")
    fresh = qdora.load_model(tiny_nf4, adapter=qdora.AdapterConfig(rank=4))
    for key, tensor in adapter_tensors(tmp_path).items():
        path, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if part == "magnitude_vector.weight":
            assert torch.equal(tensor, fresh.get_submodule(path).base_norm()), key
        elif part == "B.weight":
            assert tensor.any(), key


@pytest.mark.parametrize(("part", "frozen"), [("magnitude", ("magnitude",)), ("direction", ("lora_A", "lora_B"))])
def test_frozen_parts_stay(
    part: str, frozen: tuple[str, ...], tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    for name, steps in (("few", 1), ("more", 3)):
        quick(tiny_nf4, pairs_file, tmp_path / name, max_steps=steps, freeze=part, save_strategy="no", weight_decay=0.1)
    few, more = adapter_tensors(tmp_path / "few"), adapter_tensors(tmp_path / "more")
    for key, tensor in few.items():
        assert torch.equal(tensor, more[key]) == any(name in key for name in frozen), key


def test_the_rates_are_in_the_report(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    rates = {"magnitude_learning_rate": 1e-4, "loraplus_lr_ratio": 16, "magnitude_weight_decay": 0.5}
    flags = {"max_steps": 2, "lr_scheduler_type": "linear", "save_strategy": "no"}
    quick(tiny_nf4, pairs_file, tmp_path, learning_rate=1e-3, **flags, **rates)
    log = [row for row in log_of(tmp_path) if row["loss"]]
    for name, highest in (("magnitude", 1e-4), ("A", 1e-3), ("B", 0.016)):
        assert [float(row[f"learning_rate_{name}"]) for row in log] == pytest.approx([highest, highest / 2])
    report = (tmp_path / "report.md").read_text()
    assert "| direction | 4,608 | 0.001 | 0 |" in report
    assert "| direction, B | 5,120 | 0.016 | 0 |" in report
    assert "| 0.0001 | 0.5 |" in report


def test_rates_that_cannot_be_had() -> None:
    """Of optimizers that take the model apart by themselves."""
    trainer: Any = SimpleNamespace(
        optimizer=None,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": []}),
        args=SimpleNamespace(optim="galore_adamw"),
        _rates=Rates(1.0, magnitude_learning_rate=0.0),
    )
    with pytest.raises(ConfigError, match="--optim galore_adamw knows no rates of magnitude and direction"):
        AdapterTrainer.create_optimizer(trainer)


def test_tensorboard_gets_the_figures(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"eval_dataset": str(pairs_file), "eval_steps": 2, "report_to": "tensorboard"}
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=4, **flags)
    (events,) = tmp_path.glob("runs/*/events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    log = log_of(tmp_path)
    for tag, name in (("train/loss", "loss"), ("eval/perplexity", "eval_perplexity"), ("eval/loss", "eval_loss")):
        logged = {int(row["step"]): float(row[name]) for row in log if row[name]}
        found = {event.step: event.value for event in read.Scalars(tag)}
        assert found == pytest.approx(logged, rel=1e-5)
    assert {"train/learning_rate", "train/tokens_per_second", "train/memory_gb"} <= set(read.Tags()["scalars"])


def test_nobody_is_told_of_a_run(
    tiny_nf4: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    for variable in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: told.append(what))
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=1)
    assert told == []
