"""The training of a run, and what it means when it ends before its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from qdora.distributed import say
from qdora.errors import CheckpointError, ConfigError, NumericsError, QDoRAError, out_of_memory, reason
from qdora.exhausted import Headroom, end_for_memory
from qdora.kept import way_back
from qdora.runrecord import Start
from qdora.signals import Stopped

__all__ = ["run_training"]

_OLD_INTERVALS = "do not match the ones in the `trainer_state.json`"  # those that are asked for now are used


@contextmanager
def _without(words: str) -> Iterator[None]:
    """Within it transformers does not say this, which is not true here."""

    def is_other(record: Any) -> bool:
        return words not in record.getMessage()

    logger = getLogger("transformers.trainer_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def run_training(trainer: Any, beginning: Start, headroom: Headroom) -> None:
    """Train to the end, from where the run begins.

    Raises:
        CheckpointError, ConfigError: a state or a flag is wrong in a way that shows only now.
        NumericsError: a loss, a gradient or a trained value is not finite.
        QDoRAError: memory ran out.
        Stopped: a signal came.
    """
    if beginning.trained:
        trainer.stand_at(beginning.checkpoint)
        return
    trainer.measures_anew = beginning.measures_anew and not beginning.same
    if beginning.same:
        trainer.args.eval_on_start = False  # it was measured, and early stopping would count it twice
    if trainer.measures_anew and trainer.args.load_best_model_at_end:
        say(f"{beginning.checkpoint} was measured otherwise; the best is chosen from here on")
    began = beginning.step
    # How patient early stopping still is, for one: without that a resumed run might end at another step.
    trainer.args.restore_callback_states_from_checkpoint |= beginning.same
    try:
        with _without(_OLD_INTERVALS):
            trainer.train(resume_from_checkpoint=beginning.checkpoint)
    except Stopped:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # the bar, the trackers
        raise
    except NumericsError as error:
        raise NumericsError(f"{error}; {way_back(Path(trainer.args.output_dir))}") from None
    except UnpicklingError:
        # torch reads a trainer's state with `weights_only`, and refuses whatever would run code
        raise CheckpointError(
            f"{beginning.checkpoint} holds what no trainer leaves there, and what might run code; do not resume from it"
        ) from None
    except (ValueError, ImportError, TypeError) as error:
        if trainer.state.global_step not in (0, began):
            raise  # flags have been taken by then
        # what the trainer finds wrong only when it makes the optimizer, the schedule or the batches
        raise ConfigError(f"training did not start: {reason(error)}; check the flags") from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise QDoRAError(end_for_memory(trainer, error, headroom)) from None
