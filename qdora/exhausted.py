"""When memory runs out: in which part of the run that was, and with which flags it would have been enough.

Where it was is read from the frames that the error came through: they hold the modules whose forward was under way,
tell a recompute from a first forward, and the optimizer from the loss. That costs a run nothing.
"""

from __future__ import annotations

import copy
import gc
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch import nn

from qdora.distributed import processes
from qdora.errors import QDoRAError, out_of_memory, reason
from qdora.flags import RunArguments
from qdora.kept import last_checkpoint, step_of, way_back
from qdora.planner import asked_plan, choose, memory_model, unfragmented
from qdora.shards import format_bytes

__all__ = ["Headroom", "end_for_memory", "memory_explained"]

# The plan that failed needed more than it was reckoned to; the next one must be well below it.
_LESS = 0.9


@dataclass(frozen=True)
class _Moment:
    """Where in a run an error was raised."""

    words: str
    whole: bool = True
    """Whether weights and optimizer are those after the last step, none half updated."""
    evaluating: bool = False


def _moment_of(error: BaseException, model: nn.Module) -> _Moment:
    """Where in a training run the error was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(isinstance(_self(frame), torch.optim.Optimizer) for frame in frames):
        return _Moment("in the optimizer's step", whole=False)
    names = {frame.f_code.co_name for frame in frames}
    place = _innermost(frames, model)
    if "evaluation_loop" in names:
        return _Moment(f"in the evaluation{place and f', in the forward of {place}'}", evaluating=True)
    if "_save_checkpoint" in names:
        return _Moment("while a checkpoint was saved")
    if "training_step" not in names:
        return _Moment("before the first step" if "_run_epoch" not in names else "between two steps")
    if any(_is_in(frame, "torch/utils/checkpoint.py", "recompute_fn", "unpack_hook") for frame in frames):
        return _Moment(f"in the recompute of {place or 'a layer'}, in the backward")
    if any(_is_in(frame, "torch/autograd/__init__.py", "backward") for frame in frames):
        return _Moment(f"in the backward{place and f' of {place}'}")
    if any(_is_in(frame, "qdora/loss.py") for frame in frames):
        return _Moment("in the loss")
    return _Moment(f"in the forward of {place}" if place else "in a step, outside the layers")


def _innermost(frames: list[FrameType], model: nn.Module) -> str:
    """The path of the deepest module that was at work, or whose weight was; empty if there is none."""
    paths = {id(module): path for path, module in model.named_modules()}
    for frame in reversed(frames):
        node = frame.f_locals.get("ctx")
        at_work = (_self(frame), getattr(getattr(node, "operands", node), "base", None))
        found = next((paths[id(module)] for module in at_work if paths.get(id(module))), None)
        if found is not None:
            return found.removesuffix(".base")
    return ""


def _self(frame: FrameType) -> Any:
    return frame.f_locals.get("self")


def _is_in(frame: FrameType, file: str, *functions: str) -> bool:
    inside = Path(frame.f_code.co_filename).as_posix().endswith(file)
    return inside and (not functions or frame.f_code.co_name in functions)


def _let_go(error: BaseException) -> None:
    """Free what the error's frames hold, activations above all."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _room_on(device: torch.device) -> int:
    """The bytes that this process may have of the device, with what it has there already."""
    if device.type == "cpu":
        return int(min(psutil.virtual_memory().available, _allowed()))
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free + torch.accelerator.memory_reserved(device))


def _allowed() -> float:
    """What a limit on this process (`ulimit -v`) leaves, where systems have such limits."""
    if not hasattr(psutil, "RLIMIT_AS"):
        return math.inf
    process = psutil.Process()
    limit, _ = process.rlimit(psutil.RLIMIT_AS)
    return math.inf if limit == psutil.RLIM_INFINITY else limit - process.memory_info().vms


class Headroom:
    """What a run may use, and how it would fit in that.

    Args:
        run, training: as `parse_train` returns them; copied, for the trainer changes its own.
        sharded: whether the weights are spread over several devices, which the planner does not reckon with.
    """

    def __init__(self, run: RunArguments, training: Any, sharded: bool) -> None:
        self._run, self._training, self._sharded = copy.copy(run), copy.copy(training), sharded
        self._room = _room_on(training.device)

    def advice(self) -> str:
        """Flags with which the run fits, as `qdora estimate` would choose them, or what else to do."""
        less = "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps) or --max_length"
        if self._sharded:
            return less
        try:
            return self._fitting_flags()
        except (QDoRAError, MemoryError, RuntimeError) as error:
            return f"{less} ({reason(error)})"

    def _fitting_flags(self) -> str:
        device = self._training.device
        on_accelerator = device.type != "cpu"
        # An accelerator's share is known at any time; of the CPU's, this process has taken some by now.
        room = unfragmented(min(self._room, _room_on(device)) if on_accelerator else self._room, on_accelerator)
        reckoned = memory_model(self._run, self._training, on_accelerator)
        asked = asked_plan(self._run, self._training, on_accelerator)
        failed = reckoned.need(asked).device_bytes
        plan, need = choose(reckoned, asked, min(room, int(failed * _LESS)))
        held = " --hold_outputs false" if asked.hold_outputs and not plan.hold_outputs else ""
        return (
            f"of {format_bytes(room)} this plan takes {format_bytes(failed)}, and {format_bytes(need.device_bytes)} "
            f"with {plan.flags()}{held}"
        )


@contextmanager
def memory_explained(words: str, headroom: Headroom) -> Iterator[None]:
    """Say of memory that runs out inside when that was, and what would fit.

    Raises:
        QDoRAError: it ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = reason(error)
        _let_go(error)
        raise QDoRAError(f"out of memory {words} ({said}); {headroom.advice()}") from None


def end_for_memory(trainer: Any, error: BaseException, headroom: Headroom) -> str:
    """Save what can be saved, and say where memory ran out and how to go on.

    Args:
        trainer: whose training the error ended.
        error: loses its traceback, and with it what its frames hold.
    """
    moment, said, args = _moment_of(error, trainer.model), reason(error), trainer.args
    _let_go(error)
    trainer.model.zero_grad()
    # A checkpoint comes after the evaluation of its step: one without it would take part in no choice of the best.
    if moment.whole and not (moment.evaluating and args.load_best_model_at_end):
        _save(trainer)
    if moment.evaluating:
        advice = f"lower --per_device_eval_batch_size, which is {args.per_device_eval_batch_size}"
    else:
        advice = headroom.advice()
    done = f"after {trainer.state.global_step} of {trainer.state.max_steps} steps"
    return f"out of memory {moment.words}, {done} ({said}); {advice}; {way_back(Path(args.output_dir))}"


def _save(trainer: Any) -> None:
    """A checkpoint of the last step, unless there is one; several processes cannot, for the others wait elsewhere."""
    last, step = last_checkpoint(Path(trainer.args.output_dir)), trainer.state.global_step
    if processes() > 1 or step == 0 or (last is not None and step_of(last) == step):
        return
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
    except (QDoRAError, RuntimeError, MemoryError, OSError):
        return  # then an earlier one is the last, and is named
