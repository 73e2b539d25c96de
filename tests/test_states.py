"""Optimizer and schedule come back as a checkpoint left them, or begin where its step is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers.optimization import GreedyLR

from qdora.states import load_states, save_states


def made(kind: type[torch.optim.Optimizer] = torch.optim.Adam, **settings: Any) -> tuple[Any, LambdaLR]:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(8, dtype=torch.bfloat16))
    optimizer = kind([parameter], lr=1.0, **settings)  # type: ignore[call-arg]
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 10)


def stepped(steps: int, **settings: Any) -> tuple[Any, LambdaLR]:
    optimizer, schedule = made(**settings)
    for step in range(steps):
        optimizer.param_groups[0]["params"][0].grad = torch.full((8,), 0.1 * (step + 1), dtype=torch.bfloat16)
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def test_what_is_saved_comes_back_in_its_dtypes(tmp_path: Path) -> None:
    """torch rounds what is fp32 to the parameter's dtype as it loads."""
    optimizer, schedule = stepped(3)
    (state,) = optimizer.state.values()
    state["exp_avg"] = state["exp_avg"].float() + 1e-5
    save_states(tmp_path, optimizer.state_dict(), schedule)
    again, its_schedule = made(weight_decay=0.1)
    load_states(tmp_path, 3, again, its_schedule)
    (found,) = again.state.values()
    assert found["exp_avg"].dtype == torch.float32
    assert torch.equal(found["exp_avg"], state["exp_avg"])
    assert torch.equal(found["exp_avg_sq"], state["exp_avg_sq"])
    assert again.param_groups[0]["weight_decay"] == 0.1
    assert again.param_groups[0]["lr"] == pytest.approx(0.7)
    its_schedule.step()
    assert again.param_groups[0]["lr"] == pytest.approx(0.6)


@pytest.mark.parametrize("left", [["optimizer.pt"], ["scheduler.pt"], []])
def test_the_schedule_stands_at_its_step_whatever_is_left(left: list[str], tmp_path: Path) -> None:
    optimizer, schedule = stepped(4)
    save_states(tmp_path, optimizer.state_dict(), schedule)
    for name in {"optimizer.pt", "scheduler.pt"} - set(left):
        (tmp_path / name).unlink()
    again, its_schedule = made()
    load_states(tmp_path, 4, again, its_schedule)
    assert again.param_groups[0]["lr"] == pytest.approx(0.6)
    assert bool(again.state) == ("optimizer.pt" in left)
    its_schedule.step()
    assert again.param_groups[0]["lr"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", [ReduceLROnPlateau, GreedyLR])
def test_a_schedule_that_steps_by_what_is_measured_begins_afresh(kind: Any, tmp_path: Path) -> None:
    optimizer, schedule = stepped(2)
    save_states(tmp_path, optimizer.state_dict(), schedule)
    (tmp_path / "optimizer.pt").unlink()
    again, _ = made()
    load_states(tmp_path, 2, again, kind(again))
    assert again.param_groups[0]["lr"] == 1.0


def test_another_kind_of_schedule_is_refused(tmp_path: Path) -> None:
    optimizer, _ = stepped(2)
    save_states(tmp_path, optimizer.state_dict(), ReduceLROnPlateau(optimizer))
    again, schedule = made()
    with pytest.raises(ValueError, match="its schedule is of another kind"):
        load_states(tmp_path, 2, again, schedule)
