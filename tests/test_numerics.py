"""A step that is not finite never reaches the weights, and where it began is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qdora
from qdora import NumericsError
from qdora.inject import adapted_linears
from qdora.numerics import LIMIT_IN_A_ROW, FiniteGuard, check_weights, find_source
from qdora.trainer import AdapterTrainer
from tests.conftest import make_model
from tests.test_train import adapter_tensors, quick
from tests.test_trainer import log_of

POISON = "~"


def spoil(model: Path, key: str, value: float, row: int | None = None) -> Path:
    """Write a value into a checkpoint's tensor: into all of it, or one of its rows."""
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key][slice(None) if row is None else row] = value
            save_file(tensors, file, metadata={"format": "pt"})
            return model
    raise KeyError(key)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to which one token is NaN; rows without it are as good as any."""
    model = make_model(tmp_path_factory.mktemp("poisoned") / "model", tie=False)
    token = qdora.load_tokenizer(model)(POISON)["input_ids"][0]
    return spoil(model, "model.embed_tokens.weight", float("nan"), token)


def rows(path: Path, bad: set[int], count: int = 48) -> Path:
    prompts = [f"{POISON if i in bad else ''}{i} and {i + 1}?" for i in range(count)]
    path.write_text("".join(json.dumps({"prompt": p, "completion": f" {i}"}) + "\n" for i, p in enumerate(prompts)))
    return path


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in the order of their file."""
    monkeypatch.setattr(AdapterTrainer, "_get_train_sampler", lambda *_: None)


@pytest.mark.parametrize(
    "flags",
    [
        {"max_grad_norm": 0, "optim": "adamw_8bit"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lora_dropout": 0.1},
        {"loss_type": "dft"},
    ],
    ids=str,
)
def test_it_stops_before_the_step(flags: dict[str, Any], poisoned: Path, tmp_path: Path, in_order: None) -> None:
    """The third step's fifth row is NaN; the weights are those after the second, whatever made the step."""
    out, data = tmp_path / "out", rows(tmp_path / "rows.jsonl", bad={20})
    says = (
        r"the loss of step 3 is not finite, first in the output of model\.embed_tokens; the step was not applied.*"
        r"--on_nonfinite skip; the last good checkpoint is .*checkpoint-2: go on with --resume_from_checkpoint last"
    )
    with pytest.raises(NumericsError, match=says):
        quick(poisoned, data, out, max_steps=5, save_steps=2, **flags)
    assert not (out / "adapter_model.safetensors").exists()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in adapter_tensors(out / "checkpoint-2").values())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_step_that_is_skipped_is_as_if_its_rows_were_not_there(
    optim: str, poisoned: Path, tmp_path: Path, in_order: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"save_strategy": "no", "optim": optim, "lora_dropout": 0.0, "logging_steps": 2, "weight_decay": 0.1}
    with_bad = rows(tmp_path / "bad.jsonl", bad={20})
    report = quick(poisoned, with_bad, tmp_path / "bad", max_steps=5, on_nonfinite="skip", **flags)
    lines = with_bad.read_text().splitlines(keepends=True)
    (tmp_path / "good.jsonl").write_text("".join(lines[:16] + lines[24:40]))
    quick(poisoned, tmp_path / "good.jsonl", tmp_path / "good", max_steps=4, **flags)
    a, b = adapter_tensors(tmp_path / "bad"), adapter_tensors(tmp_path / "good")
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    said = "step 3, its loss is not finite, first in the output of model.embed_tokens"
    assert report.remarks[0] == f"1 of 5 steps left out, which changed nothing, first {said}"
    assert said in str(report)
    assert f"step 3 left out: {said.partition(', ')[2]}" in capsys.readouterr().out
    assert "**1 of 5 steps left out" in (tmp_path / "bad" / "report.md").read_text()
    log = [row for row in log_of(tmp_path / "bad") if row["loss"]]
    assert [row["steps_left_out"] for row in log] == ["", "", "1", ""]
    assert all(0 < float(row["loss"]) < 20 for row in log)


def test_a_mean_is_of_the_steps_that_were_applied(poisoned: Path, tmp_path: Path, in_order: None) -> None:
    flags = {"max_steps": 4, "learning_rate": 0.0, "logging_first_step": False, "save_strategy": "no"}
    quick(poisoned, rows(tmp_path / "a.jsonl", bad=set()), tmp_path / "a", logging_steps=1, **flags)
    losses = [float(row["loss"]) for row in log_of(tmp_path / "a") if row["loss"]]
    flags |= {"on_nonfinite": "skip", "logging_steps": 4}
    report = quick(poisoned, rows(tmp_path / "b.jsonl", bad={20}), tmp_path / "b", **flags)
    assert report.last_loss == pytest.approx((losses[0] + losses[1] + losses[3]) / 3, rel=1e-4)
    total = next(float(row["train_loss"]) for row in log_of(tmp_path / "b") if row["train_loss"])
    assert total == pytest.approx(report.last_loss, rel=1e-4)


def test_too_many_in_a_row_stop_it_all_the_same(poisoned: Path, tmp_path: Path, in_order: None) -> None:
    data = rows(tmp_path / "rows.jsonl", bad=set(range(2, 48)))
    with pytest.raises(
        NumericsError, match=f"step {LIMIT_IN_A_ROW + 1} is not finite, the {LIMIT_IN_A_ROW}th in a row"
    ):
        quick(poisoned, data, tmp_path / "out", per_device_train_batch_size=2, on_nonfinite="skip")


@pytest.mark.parametrize(
    ("key", "value", "flags", "says"),
    [
        ("model.layers.1.mlp.down_proj.weight", float("inf"), {"load_in_4bit": False}, r"layers\.1\.mlp\.down_proj"),
        ("lm_head.weight", float("nan"), {}, r"first in the output of lm_head"),
    ],
)
def test_the_layer_is_named(
    key: str, value: float, flags: dict[str, Any], says: str, pairs_file: Path, tmp_path: Path
) -> None:
    model = spoil(make_model(tmp_path / "model", tie=False), key, value)
    with pytest.raises(NumericsError, match=f"{says}.*; no checkpoint was written yet: begin anew"):
        quick(model, pairs_file, tmp_path / "out", max_steps=2, **flags)


def test_weights_that_overflow_are_never_written(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    """The gradients are finite, the step is not; and a later step finds out before anything else is looked at."""
    flags = {"learning_rate": 3.4e38, "max_grad_norm": 0}  # fp32 holds that, bf16 does not
    with pytest.raises(NumericsError, match=r"magnitude_offset|lora_[AB] is not finite, and was not written"):
        quick(tiny_nf4, pairs_file, tmp_path / "a", max_steps=1, **flags)
    with pytest.raises(NumericsError, match=r"step 2 is not finite, first in model\.layers\.\d.*(lora_|magnitude_)"):
        quick(tiny_nf4, pairs_file, tmp_path / "b", max_steps=3, on_nonfinite="skip", **flags)
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_an_evaluation_that_is_not_finite_stops_it(poisoned: Path, tmp_path: Path) -> None:
    good, bad = rows(tmp_path / "good.jsonl", set()), rows(tmp_path / "bad.jsonl", {3}, count=8)
    flags = {"max_steps": 4, "eval_steps": 2, "eval_dataset": str(bad)}
    with pytest.raises(NumericsError, match=r"evaluation loss after step 2 .* first in the output of model\.embed"):
        quick(poisoned, good, tmp_path / "out", **flags)


def test_a_step_without_a_token_with_loss_changes_nothing(
    tiny_nf4: Path, tmp_path: Path, in_order: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such blocks come of packing `wrapped`: a long question fills one. Momentum and decay would move the weights."""
    data = tmp_path / "long.jsonl"
    row = {"prompt": "count: " + "1 2 3 4 5 6 7 8 9 " * 10, "completion": " 7"}
    data.write_text((json.dumps(row) + "\n") * 2)
    flags = {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 1, "max_length": 64}
    report = quick(tiny_nf4, data, tmp_path / "out", num_train_epochs=1, save_strategy="no", **flags)
    (remark,) = [remark for remark in report.remarks if "left out" in remark]
    assert "no token of it carries loss" in remark
    losses = [float(row["loss"]) for row in log_of(tmp_path / "out") if row["loss"]]
    assert 0 < len(losses) < report.steps
    assert min(losses) > 0


def test_a_run_of_which_no_step_was_applied_has_no_loss(tiny_nf4: Path, tmp_path: Path, in_order: None) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "count: " + "1 2 3 4 5 6 7 8 9 " * 10, "completion": " 7"}) + "\n")
    flags = {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 1, "save_strategy": "no"}
    report = quick(tiny_nf4, data, tmp_path / "out", max_steps=1, **flags)
    assert str(report).startswith("no loss in 1 steps; ")
    assert report.remarks[0].startswith("1 of 1 steps left out")
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert not [entry for entry in log if {"loss", "train_loss"} & entry.keys()]
    assert "training loss" not in (tmp_path / "out" / "report.md").read_text()


class _Explodes(torch.autograd.Function):
    """The same forward, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * torch.inf


class _Stack(nn.Module):
    def __init__(self, explodes_after: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self._explodes_after = explodes_after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == self._explodes_after:
                x = _Explodes.apply(x)
        return x


def source_of(model: nn.Module, scale: float = 1.0) -> str:
    batch = {"x": torch.ones(2, 4)}
    return find_source(model, [(batch, None)], lambda batch, _: model(batch["x"]).sum() * scale).place


def test_where_it_began() -> None:
    """In the backward: the last layer whose gradient is not finite, though those before it have none that is."""
    assert source_of(_Stack(explodes_after=2)).startswith("in the gradient of layers.2.bias")
    assert source_of(_Stack(), scale=torch.inf).startswith("in the loss itself")
    model = _Stack()
    with torch.no_grad():
        model.layers[1].weight[0, 0] = torch.nan
        model.layers[3].weight[0, 0] = torch.nan
    assert source_of(model) == "in layers.1.weight"
    model.layers[1].requires_grad_(False)
    model.layers[3].requires_grad_(False)
    assert source_of(model) == "in the output of layers.1"
    assert source_of(_Stack()) == "nowhere that a second try would show"


def guard_with(scaler: Any) -> FiniteGuard:
    model = _Stack()
    return FiniteGuard(model, lambda batch, _: model(batch["x"]).sum(), scaler=scaler)


def test_a_step_without_loss_moves_nothing_in_fp16_either() -> None:
    parameter, module = nn.Parameter(torch.ones(4)), nn.Module()
    module.register_parameter("p", parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-2)
    parameter.grad = torch.ones(4)
    optimizer.step()
    before, scaler = parameter.detach().clone(), torch.amp.GradScaler("cpu")
    guard = FiniteGuard(module, lambda *_: None, scaler=scaler)
    guard.begin(torch.tensor(0.0))
    optimizer.zero_grad()
    loss = (parameter * 0).sum()
    scaler.scale(loss).backward()
    guard.add({"labels": torch.full((1, 4), -100)}, loss, torch.tensor(0))
    scaler.unscale_(optimizer)
    assert not guard.passes(nn.utils.clip_grad_norm_([parameter], 1.0), 2)
    scaler.step(optimizer)
    assert torch.equal(parameter, before)


def test_the_scaler_of_fp16_may_overflow() -> None:
    """While it looks for its scale; once that is below 1, the gradients themselves are too large."""
    batch = {"x": torch.ones(2, 4), "labels": torch.ones(2, 4, dtype=torch.long)}
    scaler = SimpleNamespace(get_scale=lambda: 2.0**16)
    guard = guard_with(scaler)
    total = torch.tensor(0.0)
    guard.begin(total)
    guard.add(batch, torch.tensor(1.0), None)
    assert guard.passes(torch.tensor(torch.inf), 1)
    scaler.get_scale = lambda: 0.5
    guard.begin(total)
    guard.add(batch, torch.tensor(1.0), None)
    with pytest.raises(NumericsError, match="the gradient of step 2 is not finite, first nowhere"):
        guard.passes(torch.tensor(torch.inf), 2)


@pytest.mark.parametrize("half", [True, False])
def test_what_float16_cannot_hold_is_told_as_that(half: bool) -> None:
    """In weights of float16, or under autocast in it, which has a scaler."""
    batch = {"x": torch.full((2, 4), 6e4), "labels": torch.ones(2, 4, dtype=torch.long)}
    model = _Stack()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.fill_(1.0)
    if half:
        model, batch["x"] = model.half(), batch["x"].half()

    def replay(batch: Any, _: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16, enabled=not half):
            return model(batch["x"]).sum()

    guard = FiniteGuard(model, replay, scaler=None if half else SimpleNamespace(get_scale=lambda: 2.0**16))
    guard.begin(torch.tensor(0.0))
    guard.add(batch, replay(batch, None), None)
    with pytest.raises(
        NumericsError,
        match=r"first in the output of layers\.0; .* float16 ends at 65,504: use --dtype bfloat16 without --fp",
    ):
        guard.passes(torch.tensor(torch.nan), 1)


def test_nothing_not_finite_is_saved(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=qdora.AdapterConfig(rank=2))
    check_weights(model)
    path, layer = next(iter(adapted_linears(model).items()))
    with torch.no_grad():
        layer.lora_B[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=rf"{path}\.lora_B is not finite, and was not written"):
        check_weights(model)
