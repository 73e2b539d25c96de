"""What a person sees of a run while it goes on: a bar with loss, speed, memory and the time left, or plain lines.

A bar that is written to a file is noise, so that without a terminal each log entry becomes one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

__all__ = ["Progress", "Speedometer", "describe", "memory_bytes"]


class Speedometer(TrainerCallback):
    """Counts tokens, and tells how many came by a second of training; evaluations and checkpoints do not count.

    Args:
        device: whose memory is read.
        processes: how many train; each is taken to have as many tokens as this one.
    """

    def __init__(self, device: torch.device, processes: int = 1) -> None:
        self._device, self._processes = device, processes
        self._tokens: Tensor | int = 0
        self._since = self._stepped = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = self._stepped = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_out_time()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_out_time()

    def _leave_out_time(self) -> None:
        """What went by since the last step or reading was no training."""
        now = time.perf_counter()
        self._since, self._stepped = self._since + now - self._stepped, now

    def count(self, inputs: Mapping[str, Any]) -> None:
        """One micro-batch; padding does not count. Does not wait for the device."""
        mask = inputs.get("attention_mask")
        self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())

    def read(self) -> dict[str, float]:
        """Tokens a second since the last reading, and the memory in use at the most, in GB."""
        tokens = int(self._tokens) * self._processes  # waits for the device
        now = time.perf_counter()
        seconds = now - self._since
        self._tokens, self._since, self._stepped = 0, now, now
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gb": round(memory_bytes(self._device) / 1e9, 3),
        }


def memory_bytes(device: torch.device) -> int:
    """The most that was allocated on an accelerator; on the CPU what the process holds now."""
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return int(torch.accelerator.max_memory_allocated(device))


def describe(logs: Mapping[str, Any]) -> str:
    """A log entry as a person reads it."""
    parts = []
    for name, form in _FORMS.items():
        if name in logs:
            parts.append(form.format(logs[name]))
    return ", ".join(parts)


_FORMS = {
    "loss": "loss {:.4f}",
    "eval_loss": "evaluation loss {:.4f}",
    "eval_perplexity": "perplexity {:.2f}",
    "eval_exact_match": "exact match {:.1%}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gb": "{:.2f} GB",
}


class Progress(TrainerCallback):
    """The bar, in place of the trainer's own.

    Args:
        bar: False writes lines.
    """

    def __init__(self, bar: bool) -> None:
        self._with_bar = bar and sys.stderr.isatty()
        self._bar: Any = None
        self._evaluation: Any = None
        self._started, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._first = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self._with_bar:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit=" steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not self._with_bar or not state.is_world_process_zero:
            return
        if self._evaluation is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self._evaluation = tqdm(total=total, desc="evaluate", unit=" batches", leave=False)
        self._evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
        self._say(state, f"step {state.global_step}: {describe(metrics or {})}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        if self._bar is not None:
            self._bar.set_postfix_str(describe(logs))
        else:
            left = self._seconds_left(state)
            self._say(state, f"step {state.global_step} of {state.max_steps}: {describe(logs)}, {left} left")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _seconds_left(self, state: Any) -> str:
        done = max(1, state.global_step - self._first)
        seconds = (time.perf_counter() - self._started) / done * (state.max_steps - state.global_step)
        return str(tqdm.format_interval(seconds))

    def _say(self, state: Any, line: str) -> None:
        if state.is_world_process_zero:
            tqdm.write(line, file=sys.stderr if self._bar is not None else sys.stdout)
