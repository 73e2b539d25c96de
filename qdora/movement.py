"""Whether everything moves that should: a trained tensor in which not one value has changed is reported.

What is kept of each tensor is one number, a sum of its bits in which every position weighs differently; no copies. It
is looked at twice, when the warm-up is some steps over and when training ends (where it is stopped early: at the last
checkpoint, before the best is put back), and costs nothing in between.

At the very first step only B can move, for A's gradient is a product with B, which begins at 0; so nothing is said of
runs of fewer than three steps. A part that was frozen, or given a rate of 0, is not expected to move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qdora.distributed import local, say, summed

__all__ = ["MovementWatch", "bit_sum"]

_STEPS_AFTER_WARMUP = 10
_FEWEST_STEPS = 3
_VALUES_AT_ONCE = 2**20
_KINDS = {"magnitude_offset": "magnitudes", "lora_A": "A", "lora_B": "B"}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: Tensor) -> Tensor:
    """A number that almost surely changes when a bit of the tensor does, () int64 on its device."""
    held = local(tensor.detach())
    bits = held.contiguous().view(_BITS[held.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    # A part at a time: in int64 a whole embedding would take a dozen times its own memory.
    for start in range(0, len(bits), _VALUES_AT_ONCE):
        part = bits[start : start + _VALUES_AT_ONCE].long()
        total += part.mul_(torch.arange(start + 1, start + 1 + len(part), device=part.device)).sum()
    return total


class MovementWatch(TrainerCallback):
    """Says once what has not moved, a few steps after the warm-up, and keeps what never did for the report."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._first = self._when = 0
        self._remark: str | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._first = state.global_step
        self._when = max(self._first, args.get_warmup_steps(state.max_steps)) + _STEPS_AFTER_WARMUP
        moving = {id(p) for group in optimizer.param_groups if _rate_of(group) > 0 for p in group["params"]}
        self._before = {name: bit_sum(p) for name, p in model.named_parameters() if id(p) in moving}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in (self._when, state.max_steps):
            self._tell(state.global_step, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_training_stop:
            self._tell(state.global_step, model)

    def _tell(self, step: int, model: Any) -> None:
        done = step - self._first
        if done < _FEWEST_STEPS:
            return
        earlier, self._remark = self._remark, self._look(model, done)
        if self._remark is not None and earlier is None:
            say(self._remark)

    def remark(self) -> str | None:
        """What is to be said of it at the end."""
        return self._remark

    def _look(self, model: nn.Module, steps: int) -> str | None:
        if not self._before:
            return None
        now = {name: bit_sum(p) for name, p in model.named_parameters() if name in self._before}
        moved = summed(torch.stack([now[name] != before for name, before in self._before.items()]).int()).tolist()
        still = [name for name, has_moved in zip(self._before, moved, strict=True) if not has_moved]
        return _sentence(still, list(self._before), steps) if still else None


def _rate_of(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _sentence(still: list[str], watched: list[str], steps: int) -> str:
    kinds = [_kind_of(name) for name in watched]
    counts = [
        f"{sum(_kind_of(name) == kind for name in still)} of {kinds.count(kind)} {kind}"
        for kind in dict.fromkeys(map(_kind_of, still))
    ]
    return (
        f"not moved in {steps} steps: {', '.join(counts)}, first {still[0]}; raise --learning_rate, or find out why "
        "no gradient comes there"
    )


def _kind_of(name: str) -> str:
    return _KINDS.get(name.rpartition(".")[2], "other tensors")
