"""What happens between the steps of a run, in the trainer's own way of hooking in."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from qdora.flags import asks_to_resume
from qdora.kept import checkpoint_of
from qdora.numerics import FiniteGuard
from qdora.offload import HostInputs
from qdora.signals import Stopped, StopRequest

__all__ = [
    "EndAtTheFirstAdapter",
    "KeepInputsOnHost",
    "LogTheEnd",
    "MeasureTheEnd",
    "SaveAfterEpoch",
    "StopWhenAsked",
    "TellWhereItBegins",
]


class TellWhereItBegins(TrainerCallback):
    """Tells the guard at which step a run, maybe a resumed one, begins; and that its intervals are those of its flags,
    for the trainer would go on by the checkpoint's."""

    def __init__(self, guard: FiniteGuard) -> None:
        self._guard = guard

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._guard.start(state.global_step)
        state.compute_steps(args, state.max_steps)


class LogTheEnd(TrainerCallback):
    """Logs the last step too: it is what a report ends with."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class MeasureTheEnd(TrainerCallback):
    """Evaluate, and save, after the last step too: otherwise what came after the last evaluation could not be kept."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class SaveAfterEpoch(TrainerCallback):
    """Lets a checkpoint that is due after an epoch's last step wait for the evaluation that is due then.

    What goes on from a checkpoint goes on with the next epoch: it would never make up for that evaluation, nor draw
    what it draws.
    """

    _waits = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends = float(state.epoch).is_integer() or control.should_training_stop
        if control.should_save and args.eval_strategy == "epoch" and ends:
            control.should_save, self._waits = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._waits:
            control.should_save, self._waits = True, False


class StopWhenAsked(TrainerCallback):
    """Ends the training after the step in which a signal asked for it, once a checkpoint is saved.

    All processes end after the same step, whichever of them got the signal and when. At the end of an epoch the
    checkpoint waits for the evaluation that is due then, or a resumed run would go without it; and a run that is at its
    end ends as it would.

    Args:
        request: entered while the training runs.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request, self._number = request, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = self._request.number
        if args.world_size > 1:
            largest = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            number = int(largest)  # waits for the device
        self._number = 0 if control.should_training_stop else number
        if self._number and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._number and not control.should_training_stop:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._number and not control.should_training_stop:
            where = checkpoint_of(args.output_dir, state.global_step)
            at = f" after step {state.global_step} of {state.max_steps}"
            how = "--resume_from_checkpoint last" if asks_to_resume(args) else "the same command"
            raise Stopped(self._number, f"{at}, saved as {where}; {how} goes on from there")


class EndAtTheFirstAdapter(TrainerCallback):
    """Lets the backward end where the first gradient is wanted, once the trainer has enabled gradient checkpointing.

    With that transformers asks for the gradient of what the embedding returns, so that frozen layers below the first
    adapter are computed again and gone through in vain. Only reentrant checkpointing needs it, which some models of
    strangers do by themselves, whatever was asked for.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if layers and not any(map(_is_reentrant, layers)):
            model.disable_input_require_grads()


def _is_reentrant(layer: GradientCheckpointingLayer) -> bool:
    """Whether a layer may be recomputed so: unless it has been given what does otherwise."""
    how: Any = getattr(layer, "_gradient_checkpointing_func", None)
    plain = isinstance(how, partial) and how.keywords.get("use_reentrant") is False
    return not (plain or isinstance(how, HostInputs))


class KeepInputsOnHost(TrainerCallback):
    """Lets the layers' inputs wait on the host, once the trainer has enabled gradient checkpointing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        HostInputs(self._device).install(model)
