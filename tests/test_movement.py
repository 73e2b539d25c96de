"""What stands still is reported; what was frozen is not, nor what has moved by one bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qdora.movement import MovementWatch, bit_sum
from tests.test_train import quick


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_bit_is_movement(dtype: torch.dtype) -> None:
    tensor = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = bit_sum(tensor)
    assert bit_sum(tensor.clone()) == before
    last = tensor[-1, -1].clone()
    tensor[-1, -1] = torch.nextafter(last, torch.tensor(torch.inf, dtype=dtype))
    assert bit_sum(tensor) != before
    tensor[-1, -1] = last
    assert bit_sum(tensor) == before
    assert bit_sum(tensor.flip(0)) != before  # the same values elsewhere


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("lora_A", "lora_B", "magnitude_offset"):
            setattr(self, name, nn.Parameter(torch.ones(4)))


def test_when_it_looks_and_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps after the warm-up, and at the end, for what may have moved since."""
    model, watch = nn.Sequential(_Linear(), _Linear()), MovementWatch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state, settings = SimpleNamespace(global_step=5, max_steps=40), SimpleNamespace(get_warmup_steps=lambda _: 8)

    def go_to(step: int, *names: str) -> None:
        for name in names:
            model.get_parameter(name).data.add_(1)
        state.global_step = step
        watch.on_step_end(settings, state, None, model=model)

    watch.on_train_begin(settings, state, None, model=model, optimizer=optimizer)
    go_to(17, "0.lora_A", "1.lora_A", "0.lora_B")
    assert watch.remark() is None
    go_to(18)
    said = "not moved in 13 steps: 2 of 2 magnitudes, 1 of 2 B, first 0.magnitude_offset; raise --learning_rate"
    assert capsys.readouterr().out.startswith(said)
    go_to(40, "0.magnitude_offset", "1.lora_B")
    assert capsys.readouterr().out == ""
    assert str(watch.remark()).startswith("not moved in 35 steps: 1 of 2 magnitudes, first 1.magnitude_offset;")


def test_a_run_that_is_stopped_early_is_looked_at(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"validation_split_percentage": 25, "early_stopping_patience": 3, "eval_steps": 1, "max_steps": 30}
    report = quick(tiny_nf4, pairs_file, tmp_path, **flags, learning_rate=1e-30)
    assert report.steps == 4
    assert "not moved in 4 steps" in str(report)


def test_it_takes_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(50, 7).bfloat16()
    at_once = bit_sum(values)
    monkeypatch.setattr("qdora.movement._VALUES_AT_ONCE", 11)
    assert torch.equal(bit_sum(values), at_once)


def test_a_run_says_so(tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: Any) -> None:
    """Plain SGD at this rate moves no bit of most of A, which is bf16."""
    report = quick(tiny_nf4, pairs_file, tmp_path, max_steps=4, optim="sgd", save_strategy="no", logging_steps=4)
    (remark,) = report.remarks
    assert remark.startswith("not moved in 4 steps: ")
    assert capsys.readouterr().out.count(remark) == 1
    assert remark in str(report)
    assert remark[1:] in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        {"freeze": "magnitude"},
        {"magnitude_learning_rate": 0.0},
        {"max_steps": 1},
    ],
    ids=str,
)
def test_what_is_meant_to_stand_still_is_not_said(
    flags: dict[str, Any], tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    assert quick(tiny_nf4, pairs_file, tmp_path, **{"max_steps": 4, "save_strategy": "no", **flags}).remarks == ()
