"""Training on a tiny model: it learns, what trains moves, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qdora
from qdora import CheckpointError, ConfigError, DataError, NumericsError, arithmetic
from qdora.arguments import parse_estimate
from qdora.inject import adapted_linears
from qdora.trainer import AdapterTrainer
from qdora.verbs.train import _settle_dtype, train_from_arguments
from tests.conftest import make_model, make_tokenizer
from tests.mutate import Payload

QUICK: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "max_length": 64,
    "disable_tqdm": True,
    "use_cpu": True,
}


def quick(model: Path, data: Path, out: Path, **flags: Any) -> qdora.TrainReport:
    settings = {**QUICK, "model_name_or_path": str(model), "dataset": str(data), "output_dir": str(out), **flags}
    report = qdora.train(**settings)
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("flags", "computes_in", "says"),
    [
        ({}, torch.float32, "this CPU is slow in bfloat16: computing in float32"),
        (
            {"dtype": "bfloat16"},
            torch.bfloat16,
            "this CPU is slow in bfloat16: --dtype float32, without",
        ),
        ({"bf16": True}, torch.bfloat16, "this CPU is slow in bfloat16: --dtype float32, without"),
        ({"dtype": "float32"}, torch.float32, None),
    ],
)
def test_on_a_cpu_that_is_slow_in_bfloat16(
    flags: dict[str, Any],
    computes_in: torch.dtype,
    says: str | None,
    tiny_nf4: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda _: False)
    dtypes = []
    embed = torch.nn.Embedding.forward

    def watched(self: Any, ids: torch.Tensor) -> torch.Tensor:
        dtypes.append(self.weight.dtype)
        return embed(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", watched)
    quick(tiny_nf4, pairs_file, tmp_path / "a", max_steps=1, **flags)
    assert set(dtypes) == {computes_in}
    said = capsys.readouterr().out
    assert says in said if says else "slow" not in said
    trained = adapter_tensors(tmp_path / "a")
    assert {tensor.dtype for name, tensor in trained.items() if "lora_A" in name} == {torch.bfloat16}


def test_with_a_scaled_loss_it_is_said_in_what_the_adapter_trains(capsys: pytest.CaptureFixture[str]) -> None:
    run, training = parse_estimate(["--model_name_or_path", "m", "--fp16", "true", "--use_cpu", "true"])
    _settle_dtype(run, training)
    assert "--fp16 scales the loss: the adapter is trained in float32\n" in capsys.readouterr().out
    assert run.dtype in ("bfloat16", "float32")  # of the weights, as without: autocast does the rest


def adapter_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_it_learns_and_says_so(tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: Any) -> None:
    report = quick(tiny_nf4, pairs_file, tmp_path, max_steps=12, eval_dataset=str(pairs_file), eval_strategy="epoch")
    assert report.last_loss < 0.7 * report.first_loss
    assert report.steps == 12
    assert report.eval_loss is not None
    assert report.eval_loss < report.first_loss
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "48 rows in the prompt/completion layout" in capsys.readouterr().out
    assert "adapter in" in str(report)
    model = qdora.load_model(tiny_nf4, adapter=tmp_path)
    for path, layer in adapted_linears(model).items():
        assert layer.magnitude_offset is not None
        assert (layer.magnitude_offset != 0).all(), path
        assert layer.lora_B.any(dim=1).all(), path


@pytest.mark.parametrize("flags", [{"use_dora": False}, {"load_in_4bit": False}, {"adapter_dtype": "float32"}])
def test_the_other_methods(flags: dict[str, Any], tiny: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = quick(tiny, pairs_file, tmp_path, max_steps=8, save_strategy="no", **flags)
    assert report.last_loss < report.first_loss
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is flags.get("use_dora", True)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor"])
def test_optimizers_by_their_names(optim: str, tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = quick(tiny_nf4, pairs_file, tmp_path, max_steps=6, save_strategy="no", optim=optim, learning_rate=2e-3)
    assert report.last_loss < report.first_loss
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 6


def test_a_resumed_run_is_the_uninterrupted_one(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"save_steps": 3, "lr_scheduler_type": "linear", "max_steps": 6, "lora_dropout": 0.1}
    quick(tiny_nf4, pairs_file, tmp_path / "whole", **flags)
    whole = adapter_tensors(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not (checkpoint / "model.safetensors").exists()
    quick(tiny_nf4, pairs_file, tmp_path / "resumed", resume_from_checkpoint=str(checkpoint), **flags)
    resumed = adapter_tensors(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key
    with pytest.raises(ConfigError, match="holds an earlier run"):
        quick(tiny_nf4, pairs_file, tmp_path / "whole", **flags)
    report = quick(tiny_nf4, pairs_file, tmp_path / "whole", **{**flags, "max_steps": 7}, resume_from_checkpoint="last")
    assert report.steps == 7


def test_the_same_seed_gives_the_same_bits(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quick(tiny_nf4, pairs_file, tmp_path / name, max_steps=3, save_strategy="no")
    a, b = adapter_tensors(tmp_path / "a"), adapter_tensors(tmp_path / "b")
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_accumulation_weights_tokens(tiny_nf4: Path, tmp_path: Path) -> None:
    data = tmp_path / "uneven.jsonl"
    rows = [{"prompt": "count:", "completion": " 1" * (1 + 5 * (i % 4))} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"max_steps": 2, "save_strategy": "no", "adapter_dtype": "float32", "dtype": "float32", "max_grad_norm": 0}
    whole = quick(tiny_nf4, data, tmp_path / "whole", **flags)
    parts = quick(
        tiny_nf4, data, tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **flags
    )
    assert parts.first_loss == pytest.approx(whole.first_loss, rel=1e-5)
    a, b = adapter_tensors(tmp_path / "whole"), adapter_tensors(tmp_path / "parts")
    for key, tensor in a.items():
        if "lora_B" in key:
            assert torch.nn.functional.cosine_similarity(tensor.flatten(), b[key].flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    "flags",
    [
        {"stream_base": True},
        {"activation_offloading": True},
        {"hold_outputs": True},
        {"hold_outputs": True, "stream_base": True, "activation_offloading": True},
        {"stream_base": True, "activation_offloading": True, "embedding_on_host": True},
    ],
)
def test_other_ways_to_run_train_the_same_bits(flags: dict[str, Any], pairs_file: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie=False, num_hidden_layers=5)
    settings = {"max_steps": 3, "save_strategy": "no", "lora_r": 2, "loss_chunk_size": "1MiB"}
    quick(model, pairs_file, tmp_path / "plain", **settings)
    quick(model, pairs_file, tmp_path / "other", **settings, **flags)
    a, b = adapter_tensors(tmp_path / "plain"), adapter_tensors(tmp_path / "other")
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_a_run_is_made_to_fit(tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: Any) -> None:
    flags = {"max_steps": 3, "save_strategy": "no", "lora_r": 2, "dtype": "float32"}
    asked = quick(tiny_nf4, pairs_file, tmp_path / "asked", **flags)
    capsys.readouterr()
    fitted = quick(tiny_nf4, pairs_file, tmp_path / "fitted", **flags, memory="1MB")
    assert "plan: --per_device_train_batch_size 1 --gradient_accumulation_steps 8" in capsys.readouterr().out
    assert fitted.steps == asked.steps == 3
    assert fitted.last_loss == pytest.approx(asked.last_loss, rel=0.02)


def test_memory_to_spare_holds_outputs(tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: Any) -> None:
    flags = {"max_steps": 2, "save_strategy": "no", "lora_r": 2, "memory": "1GB"}
    quick(tiny_nf4, pairs_file, tmp_path / "held", **flags)
    out = capsys.readouterr().out
    assert "--hold_outputs true" in out
    assert "holding the outputs of mlp.down_proj" in out
    quick(tiny_nf4, pairs_file, tmp_path / "not", **flags, hold_outputs=False)
    assert "hold" not in capsys.readouterr().out
    a, b = adapter_tensors(tmp_path / "held"), adapter_tensors(tmp_path / "not")
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_a_dry_run_says_what_it_needs_and_leaves_nothing(
    tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**QUICK, "model_name_or_path": str(tiny_nf4), "dataset": str(pairs_file), "dry_run": True}
    assert qdora.train(**settings, output_dir=str(tmp_path / "out")) is None
    out = capsys.readouterr().out
    assert "plan: --per_device_train_batch_size 8" in out
    assert "base weights" in out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="nothing fits in 10 kB: the least is"):
        qdora.train(**settings, output_dir=str(tmp_path / "out"), memory="10kB")
    assert not (tmp_path / "out").exists()


def test_best_checkpoint_and_chunked_evaluation(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"eval_dataset": str(pairs_file), "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=4, load_best_model_at_end=True, **flags)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    a, b = adapter_tensors(tmp_path), adapter_tensors(best)
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_packing(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = quick(tiny_nf4, pairs_file, tmp_path, max_steps=2, packing=True, packing_strategy="wrapped")
    assert report.steps == 2


def test_the_config_file_and_the_flags_are_one(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    settings = {
        **QUICK,
        "model_name_or_path": tiny_nf4,
        "dataset": pairs_file,
        "output_dir": tmp_path / "a",
        "max_steps": 9,
    }
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    report = train_from_arguments([str(config), "--max_steps", "2", "--save_strategy=no"])
    assert (report.output_dir, report.steps) == (tmp_path / "a", 2)
    assert qdora.train(config, max_steps=1, output_dir=str(tmp_path / "b"), save_strategy="no").steps == 1


def test_a_loss_that_is_not_finite_is_an_error(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="the loss of step 2 is not finite"):
        quick(tiny_nf4, pairs_file, tmp_path, max_steps=4, learning_rate=1e38, save_strategy="no", max_grad_norm=0)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_nothing_is_written_when_the_input_is_wrong(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = tmp_path / "bad.jsonl"
    rows = [json.dumps({"prompt": "x", "completion": "y"})] * 16 + [json.dumps({"prompt": "x"})]
    bad.write_text("\n".join(rows))
    with pytest.raises(DataError, match="row 17: the field 'completion' is missing"):
        quick(tiny_nf4, bad, out)
    with pytest.raises(DataError, match="every label would be masked"):
        quick(tiny_nf4, pairs_file, out, max_length=2)
    with pytest.raises(ConfigError, match="nothing to resume"):
        quick(tiny_nf4, pairs_file, out, resume_from_checkpoint="last")
    with pytest.raises(ConfigError, match="nothing to resume"):
        quick(tiny_nf4, pairs_file, out, resume_from_checkpoint=str(tmp_path / "absent"))
    model = shutil.copytree(tiny_nf4, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    assert quick(model, pairs_file, tmp_path / "fine", max_steps=1).steps == 1
    bad.write_text("\n".join(rows[:8]).replace("y", "<extra>"))
    with pytest.raises(CheckpointError, match=r"gives token \d+ \('<extra>'\), and the model has"):
        quick(model, bad, out)
    tokenizer.pad_token = "<extra>"
    tokenizer.save_pretrained(model)
    with pytest.raises(CheckpointError, match="and the model has"):
        quick(model, pairs_file, out)
    assert not out.exists()


def test_a_stranger_s_checkpoint_runs_no_code(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    quick(tiny_nf4, pairs_file, tmp_path / "run", max_steps=2, save_steps=1)
    checkpoint, canary = tmp_path / "run" / "checkpoint-1", tmp_path / "canary"
    resumed = {"max_steps": 2, "resume_from_checkpoint": str(checkpoint)}
    for name in ("training_args.bin", "adapter_model.bin", "pytorch_model.bin"):
        torch.save({"state": Payload(canary)}, checkpoint / name)
    quick(tiny_nf4, pairs_file, tmp_path / "ignored", **resumed)
    torch.save({"state": Payload(canary)}, checkpoint / "optimizer.pt")
    with pytest.raises(CheckpointError, match="might run code"):
        quick(tiny_nf4, pairs_file, tmp_path / "refused", **resumed)
    assert not canary.exists()


@pytest.mark.parametrize("step", [0, 2])
def test_an_error_in_the_middle_of_the_training_keeps_its_traceback(
    step: int, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only at the start may a flag be the reason."""
    train_step = AdapterTrainer.training_step

    def fails(trainer: Any, *given: Any) -> Any:
        if trainer.state.global_step == step:
            raise ValueError("odd")
        return train_step(trainer, *given)

    monkeypatch.setattr(AdapterTrainer, "training_step", fails)
    kind, says = (ValueError, r"^odd$") if step else (ConfigError, r"^training did not start: odd; check the flags$")
    with pytest.raises(kind, match=says):
        quick(tiny_nf4, pairs_file, tmp_path, max_steps=3)


def test_a_schedule_s_setting_that_is_none(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training did not start: .*foo.*; check the flags"):
        quick(tiny_nf4, pairs_file, tmp_path, lr_scheduler_type="cosine", lr_scheduler_kwargs={"foo": 0.5})
