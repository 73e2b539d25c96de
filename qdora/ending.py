"""How a run ends that cannot go on: what is saved of it, and the way back to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdora.distributed import processes
from qdora.errors import QDoRAError, reason
from qdora.exhausted import Headroom, let_go, moment_of
from qdora.kept import last_checkpoint, step_of

__all__ = ["end_for_memory", "way_back"]


def end_for_memory(trainer: Any, error: BaseException, headroom: Headroom) -> str:
    """Save what can be saved, and say where memory ran out and how to go on.

    Args:
        trainer: whose training the error ended.
        error: loses its traceback, and with it what its frames hold.
    """
    moment, said, args = moment_of(error, trainer.model), reason(error), trainer.args
    let_go(error)
    trainer.model.zero_grad()
    if moment.whole:
        _save(trainer)
    if moment.evaluating:
        advice = f"lower --per_device_eval_batch_size, which is {args.per_device_eval_batch_size}"
    else:
        advice = headroom.advice()
    done = f"after {trainer.state.global_step} of {trainer.state.max_steps} steps"
    return f"out of memory {moment.words}, {done} ({said}); {advice}; {way_back(trainer)}"


def _save(trainer: Any) -> None:
    """A checkpoint of the last step, unless there is one; several processes cannot, for the others wait elsewhere."""
    last, step = last_checkpoint(Path(trainer.args.output_dir)), trainer.state.global_step
    if processes() > 1 or step == 0 or (last is not None and step_of(last) == step):
        return
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
    except (QDoRAError, RuntimeError, MemoryError, OSError):
        return  # then an earlier one is the last, and is named


def way_back(trainer: Any) -> str:
    """How to go on from the last checkpoint."""
    last = last_checkpoint(Path(trainer.args.output_dir))
    if last is None:
        return "no checkpoint was written yet: begin anew"
    how = "--resume_from_checkpoint last (at the checkpoint's learning rate; another needs a new run)"
    return f"the last good checkpoint is {last}: go on with {how}"
