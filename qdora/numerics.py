"""A loss or a gradient that is not finite: kept from the weights, and followed to where it began.

What it costs. The norm of the gradients is computed in any case; it and the step's loss are read once before the
optimizer's step, and that is all. Only when one of them is not finite is the step computed a second time, from the same
random numbers, with an ear at every module: the first output that is not finite names the place. If all outputs are
finite, it began in the backward, which goes from the last layer to the first, so that the last layer whose gradient is
not finite is where.

A gradient alone could not tell. One NaN in a loss is a NaN in every gradient, and clipping by a norm that is NaN puts
one into those that had none.

All processes judge by the same sums, so that they stop or go on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdora.distributed import gathered, is_main, local, summed
from qdora.errors import NumericsError
from qdora.loss import IGNORED

__all__ = [
    "LIMIT_IN_A_ROW",
    "FiniteGuard",
    "Source",
    "check_weights",
    "find_source",
    "first_bad_output",
    "refuse_evaluation",
]

LIMIT_IN_A_ROW = 5
Batch = Mapping[str, Any]
Replay = Callable[[Any, Any], Tensor]
"""The loss of a micro-batch, given what the trainer counted for its step, as in training."""


@dataclass(frozen=True, order=True)
class Source:
    """Where numbers stopped being finite; the smaller of two explains the other."""

    rank: int
    """0 a trained tensor, 1 a module's output, 2 the loss, 3 a gradient, 4 not found."""
    place: str
    """In words."""

    def advice(self, half: bool) -> str:
        """What to do.

        Args:
            half: whether the arithmetic is fp16.
        """
        if half and self.rank > 0:
            return "float16 ends at 65,504: use --dtype bfloat16 without --fp16, or lower --learning_rate"
        return "lower --learning_rate" + (", or look at that layer of the base" if self.rank == 1 else "")


_UNKNOWN = Source(4, "nowhere that a second try would show")


class FiniteGuard:
    """Watches the steps of a trainer, and lets only finite ones be applied.

    Args:
        model: whose gradients they are.
        replay: computes a micro-batch's loss once more.
        skips: leave out a step that is not finite and go on, instead of stopping.
        scaler: of the loss, in fp16 autocast: overflowing gradients are how it finds its scale, and it skips them.
    """

    def __init__(self, model: nn.Module, replay: Replay, skips: bool = False, scaler: Any = None) -> None:
        self._model, self._replay, self._skips, self._scaler = model, replay, skips, scaler
        self._step: _Step | None = None
        self._in_a_row = self._since_log = self._left_out = self._seen = 0
        self._began = self._last_logged = 0
        self._first: str | None = None

    def begin(self, total: Tensor) -> None:
        """A micro-batch begins.

        Args:
            total: the trainer's running sum of losses, from which a step that is left out is taken.
        """
        if self._step is None:
            self._step = _Step(total, total.clone(), _random_state(total.device))

    def add(self, batch: Batch, loss: Tensor, counted: Any) -> None:
        """It ended, with this loss; `counted` are the step's tokens with loss, if the trainer counted them."""
        assert self._step is not None
        self._step.batches.append((batch, counted))
        self._step.loss = self._step.loss + loss.detach()
        tokens = (batch["labels"][:, 1:] != IGNORED).sum() if counted is None else counted
        self._step.tokens = self._step.tokens + tokens

    def passes(self, norm: Tensor | float, number: int) -> bool:
        """Whether the step may be applied; if not, its gradients are gone, and its loss is out of the sum.

        Args:
            norm: of all gradients.
            number: of the step, from 1.

        Raises:
            NumericsError: the step is not finite and none may be left out, or too many in a row were, or a trained
                tensor is not finite already. Nothing was applied.
        """
        step, self._step = self._step, None
        assert step is not None
        self._seen += 1
        loss, measured, tokens = summed(step.figures(norm)).tolist()
        if tokens == 0:
            self._leave_out(step, number, "no token of it carries loss", finite=True)
            return False
        if math.isfinite(loss) and (math.isfinite(measured) or self._scaler_sees_to_it()):
            self._in_a_row = 0
            return True
        what = "loss" if not math.isfinite(loss) else "gradient"
        source = self._search(step)
        self._in_a_row += 1
        self._stop_if_due(what, source, number)
        self._leave_out(step, number, f"its {what} is not finite, first {source.place}")
        return False

    def start(self, step: int) -> None:
        """Training begins, after so many steps."""
        self._began = self._last_logged = step

    def corrected(self, logs: dict[str, Any], step: int) -> dict[str, Any]:
        """A log entry with the mean loss of the steps that were applied, and how many since the last were not."""
        if "train_loss" in logs:
            mean = _mean_without("train_loss", logs, step - self._began, self._left_out)
            return {**{name: value for name, value in logs.items() if name != "train_loss"}, **mean}
        if "loss" not in logs:
            return logs
        steps, left_out = step - self._last_logged, self._since_log
        self._last_logged, self._since_log = step, 0
        others = {name: value for name, value in logs.items() if name != "loss"}
        said = {"steps_left_out": left_out} if left_out else {}
        return {**_mean_without("loss", logs, steps, left_out), **others, **said}

    def remark(self) -> str | None:
        """What is to be said of it all at the end."""
        if not self._left_out:
            return None
        return f"{self._left_out} of {self._seen} steps left out, which changed nothing, first {self._first}"

    def _scaler_sees_to_it(self) -> bool:
        return self._scaler is not None and self._scaler.get_scale() >= 1

    def _stop_if_due(self, what: str, source: Source, number: int) -> None:
        if self._skips and source.rank > 0 and self._in_a_row < LIMIT_IN_A_ROW:
            return
        in_a_row = f", the {self._in_a_row}th in a row" if self._skips and self._in_a_row > 1 else ""
        half = self._scaler is not None or any(p.dtype == torch.float16 for p in self._model.parameters())
        or_skip = "" if self._skips or source.rank == 0 else ", or leave such steps out with --on_nonfinite skip"
        raise NumericsError(
            f"the {what} of step {number} is not finite{in_a_row}, first {source.place}; the step was not applied. "
            f"What to do: {source.advice(half)}{or_skip}"
        )

    def _leave_out(self, step: _Step, number: int, why: str, finite: bool = False) -> None:
        step.total.copy_(step.before)
        if self._scaler is None or finite:  # which must see an overflow to leave out the step itself
            for parameter in self._model.parameters():
                parameter.grad = None
        self._left_out += 1
        self._since_log += 1
        self._first = self._first or f"step {number}, {why}"
        if is_main():
            tqdm.write(f"step {number} left out: {why}")

    def _search(self, step: _Step) -> Source:
        now = _random_state(step.total.device)
        _set_random_state(step.random)
        found = find_source(self._model, step.batches, self._replay)
        _set_random_state(now)
        return min(gathered(found))


def _mean_without(name: str, logs: Mapping[str, Any], steps: int, left_out: int) -> dict[str, Any]:
    """A mean over all steps as one over those that were applied; nothing if none was."""
    return {name: logs[name] * steps / (steps - left_out)} if steps > left_out else {}


@dataclass
class _Step:
    """What was seen of a step so far."""

    total: Tensor
    before: Tensor
    random: dict[torch.device, Tensor]
    batches: list[tuple[Batch, Any]] = field(default_factory=list)
    loss: Tensor | float = 0.0
    tokens: Tensor | int = 0

    def figures(self, norm: Tensor | float) -> Tensor:
        """Loss, norm and tokens in one tensor, to be read at once."""
        device = self.total.device
        figures = (self.loss, norm, self.tokens)
        return torch.stack([torch.as_tensor(figure, dtype=torch.float32, device=device) for figure in figures])


def find_source(model: nn.Module, batches: list[tuple[Batch, Any]], replay: Replay) -> Source:
    """Compute a step again and tell where it stops being finite; leaves the model's gradients behind.

    Does as much whatever it finds: sharded models are gathered by all processes together.
    """
    found = [Source(0, f"in {name}") for name, p in _trained(model) if not _is_finite(local(p))][:1]
    model.zero_grad()
    with first_bad_output(model) as outputs:
        for batch, counted in batches:
            loss = replay(batch, counted)
            if not _is_finite(loss):
                found.append(Source(2, "in the loss itself (its logits)"))
            loss.backward()
    found += [Source(1, f"in the output of {name}") for name in outputs]
    bad = [name for name, p in _trained(model) if p.grad is not None and not _is_finite(local(p.grad))]
    found += [Source(3, f"in the gradient of {name}, where the backward passes it") for name in bad[-1:]]
    return min([*found, _UNKNOWN])


def check_weights(model: nn.Module) -> None:
    """That every trained tensor is finite, before it is written.

    Raises:
        NumericsError: one is not, in any process.
    """
    bad = gathered(next((name for name, p in _trained(model) if not _is_finite(local(p))), None))
    named = next((name for name in bad if name is not None), None)
    if named is not None:
        raise NumericsError(f"{named} is not finite, and was not written; lower --learning_rate")


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@contextmanager
def first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """A list that gets the path of the first module whose output is not finite, if one comes."""
    found: list[str] = []

    def listen(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(map(_is_finite, _tensors(output))):
                found.append(name)

        return look

    handles = [module.register_forward_hook(listen(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, tuple | list):
        yield from (tensor for value in output for tensor in _tensors(value))


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _random_state(device: torch.device) -> dict[torch.device, Tensor]:
    """What dropout draws from, on the CPU and on the device."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    if device.type != "cpu":
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_state(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def refuse_evaluation(model: nn.Module, step: int, again: Callable[[], Any]) -> NoReturn:
    """Say that the loss of an evaluation is not finite, and where that begins.

    Args:
        again: measures it once more.

    Raises:
        NumericsError: always.
    """
    with first_bad_output(model) as outputs:
        again()
    places = [place for found in gathered(outputs) for place in found]
    where = f", first in the output of {places[0]}" if places else ""
    raise NumericsError(
        f"the evaluation loss after step {step} is not finite{where}; lower --learning_rate, or with --fp16 use "
        "--dtype bfloat16 instead"
    )
