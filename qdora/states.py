"""The states of optimizer and schedule, which a checkpoint holds beside the adapter.

The trainer's own way back from them loads the schedule only together with the optimizer, and lets torch cast what some
optimizers keep in fp32 to the parameters' bf16. Here a run whose optimizer begins afresh has the rate that is its due,
and a state comes back as it was saved. Both files are read without running any code that they might hold.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdora.groups import keep_settings
from qdora.kept import OPTIMIZER_FILE, SCHEDULE_FILE
from qdora.optimizer import CompensatedAdamW

__all__ = ["load_states", "save_states"]


def save_states(checkpoint: Path, optimizer: dict[str, Any], schedule: Any) -> None:
    """As the trainer writes them.

    Args:
        optimizer: its state, whole.
    """
    torch.save(optimizer, checkpoint / OPTIMIZER_FILE)
    torch.save(schedule.state_dict(), checkpoint / SCHEDULE_FILE)


def load_states(checkpoint: Path, step: int, optimizer: Any, schedule: Any) -> None:
    """Put them where that checkpoint left them; with decay and betas as they are asked for now.

    A rate is the schedule's, and goes on from its place there; the form and the length of the schedule are those asked
    for now. Without an optimizer's state there, this one's begins afresh, at the place of
    its own schedule that is that step's.

    Args:
        step: the checkpoint's.

    Raises:
        ValueError: the state is another optimizer's, or another kind of schedule's.
    """
    has_optimizer, has_schedule = ((checkpoint / name).is_file() for name in (OPTIMIZER_FILE, SCHEDULE_FILE))
    if has_optimizer:
        fresh, saved = [dict(group) for group in optimizer.param_groups], _read(checkpoint / OPTIMIZER_FILE)
        optimizer.load_state_dict(saved)
        _widen(getattr(optimizer, "optimizer", optimizer), saved)
        keep_settings(optimizer.param_groups, fresh)
    if has_optimizer and has_schedule:
        try:
            schedule.load_state_dict(_read(checkpoint / SCHEDULE_FILE))
        except (KeyError, TypeError, AttributeError):
            raise ValueError("its schedule is of another kind") from None
    elif "metrics" not in inspect.signature(schedule.step).parameters:  # some step by what was measured
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(step):
                schedule.step()


def _widen(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give back the fp32 that torch rounded to the parameters' dtype; ours sees to that itself."""
    if isinstance(optimizer, CompensatedAdamW):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        state = optimizer.state[parameter]
        for name, value in saved["state"].get(number, {}).items():
            now = state.get(name)
            if isinstance(now, Tensor) and isinstance(value, Tensor) and value.dtype == torch.float32 != now.dtype:
                state[name] = value.to(now.device)


def _read(file: Path) -> dict[str, Any]:
    # By way of the host: a shard's owner has no room for the whole, and transformers 5.17 asks torch for `cpu:1`.
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found
