"""Where a run goes on: from which checkpoint, if from any, and whether that is this run's own.

What a run left in its directory (`runrecord`) tells whether the same command was given again: unfinished, it goes on
from its newest whole checkpoint; finished, or with other settings or inputs, it is refused, as is a directory whose run
left no record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdora.adapterfile import CONFIG_FILE
from qdora.distributed import say
from qdora.errors import CheckpointError, ConfigError
from qdora.flags import OWN_OPTIMIZERS, RunArguments, asks_to_resume
from qdora.kept import OPTIMIZER_FILE, STATE_FILE, checkpoints_in, fault_of, last_checkpoint, state_of, step_of
from qdora.runrecord import Start, difference, is_in, read_record, settings_of

__all__ = ["check_epochs", "start"]

# What an evaluation depends on, and the best one by it.
_MEASURED_BY = (
    *("metric_for_best_model", "greater_is_better", "loss_type", "label_smoothing_factor", "router_aux_loss_coef"),
    *("eval_dataset", "eval_dataset_sha256", "eval_dataset_split", "eval_dataset_config", "eval_exact_match"),
    *("validation_split_percentage", "max_length", "completion_only_loss", "base_hash"),
    *("chat_template_path", "chat_template_path_sha256"),
)
# What tells apart which parameters an optimizer has in which groups.
_GROUPED_BY: dict[str, Callable[[Any], Any]] = {"freeze": str, "loraplus_lr_ratio": lambda ratio: ratio == 1}
_ROWS_KEPT_BACK_BY = ("dataset", "dataset_sha256", "dataset_split", "dataset_config", "seed")


def start(run: RunArguments, training: Any, output_dir: Path) -> Start:
    """Where a run with these flags begins in that directory, found before anything is written.

    Args:
        run, training: as `parse_train` returns them, before they are adapted to the machine.

    Raises:
        ConfigError: the directory holds an earlier run that this one would write over, or nothing to resume.
        CheckpointError: the checkpoint to resume is damaged.
    """
    settings = settings_of(run, training)
    record = read_record(output_dir)
    other = None if record is None else difference(record["settings"], settings)
    this = record if record is not None and not other else None
    unfinished = this if this is not None and not this["finished"] else None
    if asks_to_resume(training):
        checkpoint = _asked_for(training.resume_from_checkpoint, output_dir)
        _check_optimizer(checkpoint, settings)
        beginning = _from(checkpoint, settings, this if is_in(checkpoint, output_dir) else None)
        _check_steps(beginning, training.max_steps)
        _say_which_rate(checkpoint, settings)
        if unfinished is not None and not beginning.same and unfinished.get("began_from") == beginning.began_from:
            return _newest(settings, output_dir, unfinished) or beginning  # the same command was given again
        if is_in(checkpoint, output_dir):
            return beginning
    else:
        # If the run that is there was started without that flag, the flag asks for a new beginning.
        if unfinished and (not run.overwrite_output_dir or unfinished["settings"].get("overwrite_output_dir")):
            return _go_on(settings, output_dir, unfinished)
        beginning = Start(settings)
    began = (record and record["finished"]) or (output_dir / CONFIG_FILE).is_file() or checkpoints_in(output_dir)
    if record and not began:
        say(f"{output_dir} holds a run that ended before its first checkpoint; beginning anew")
    if began and not run.overwrite_output_dir:
        raise ConfigError(
            f"{output_dir} holds an earlier run{_which(record, other, last_checkpoint(output_dir))}, or pass "
            "--overwrite_output_dir true"
        )
    return beginning


def _from(checkpoint: Path, settings: dict[str, Any], record: dict[str, Any] | None) -> Start:
    """From a checkpoint, which is this run's if it comes after where the run began.

    Args:
        record: of the directory that holds the checkpoint, if that is of a run with these settings.
    """
    state = state_of(checkpoint)
    step, known = state.global_step, record or {}
    anew = bool(known.get("measures_anew"))
    if record is not None and step > record.get("began_at", 0):
        return Start(
            settings,
            str(checkpoint),
            same=True,
            found=True,
            began_from=record.get("began_from"),
            began_at=record.get("began_at", 0),
            measures_anew=anew,
        )
    there = read_record(checkpoint.parent)
    return Start(
        settings,
        str(checkpoint),
        found=record is not None,
        began_from=str(checkpoint.resolve()),
        began_at=step,
        measures_anew=anew or (state.best_metric is not None and _measures_otherwise(there, settings)),
    )


def _measures_otherwise(record: dict[str, Any] | None, settings: dict[str, Any]) -> bool:
    there = {} if record is None else record["settings"]
    names = [*_MEASURED_BY, *(_ROWS_KEPT_BACK_BY if settings["validation_split_percentage"] else ())]
    return any(there[name] != settings.get(name) for name in names if name in there)


def _go_on(settings: dict[str, Any], output_dir: Path, record: dict[str, Any]) -> Start:
    if checkpoints_in(output_dir) and settings.get("save_only_model"):
        raise ConfigError(
            f"{output_dir} holds this run unfinished, and its checkpoints hold the adapter alone (--save_only_model); "
            "go on with --resume_from_checkpoint last and a fresh optimizer, or choose another directory"
        )
    if (newest := _newest(settings, output_dir, record)) is not None:
        return newest
    without = f"{output_dir} holds this run unfinished, without a whole checkpoint of its own"
    if not record.get("began_from"):
        say(f"{without}; starting from the beginning")
        return Start(settings, found=True)
    say(f"{without}; starting from {record['began_from']}, as it did")
    checkpoint = _asked_for(record["began_from"], output_dir)
    _check_optimizer(checkpoint, settings)
    return _from(checkpoint, settings, record if is_in(checkpoint, output_dir) else None)


def _newest(settings: dict[str, Any], output_dir: Path, record: dict[str, Any]) -> Start | None:
    """From the newest whole checkpoint that the run of that record has left; None without one."""
    for checkpoint in reversed(checkpoints_in(output_dir)):
        if step_of(checkpoint) <= record.get("began_at", 0):
            break  # what is left is not this run's
        fault = fault_of(checkpoint, complete=True)
        if fault is None:
            say(f"{output_dir} holds this run unfinished; going on from {checkpoint.name}")
            return _from(checkpoint, settings, record)
        say(f"{checkpoint} is not whole ({fault}); looking for an earlier one")
    return None


def _check_optimizer(checkpoint: Path, settings: dict[str, Any]) -> None:
    """The state of one optimizer is none of another's, which would notice it late or never."""
    if not (checkpoint / OPTIMIZER_FILE).is_file():
        return
    begun = (read_record(checkpoint.parent) or {"settings": {}})["settings"]
    there, here = begun.get("optim"), settings["optim"]
    if there is not None and _family(there) != _family(here):
        raise ConfigError(
            f"{checkpoint} holds the state of --optim {there}, which is of no use to {here}; keep {there}, or remove "
            f"optimizer.pt from it to go on with a fresh state"
        )
    for name, parts in _GROUPED_BY.items():
        if name in begun and parts(begun[name]) != parts(settings[name]):
            raise ConfigError(
                f"{checkpoint} holds the optimizer's state of --{name} {begun[name]}, which is of no use to "
                f"{settings[name]}; keep {begun[name]}, or remove optimizer.pt from it to go on with a fresh state"
            )


def _check_steps(beginning: Start, max_steps: int) -> None:
    if 0 < max_steps <= beginning.step and not beginning.trained:
        raise ConfigError(
            f"{beginning.checkpoint} has {beginning.step} steps already; --max_steps {max_steps} leaves none, give more"
        )


def check_epochs(beginning: Start, training: Any, rows: int) -> None:
    """As `_check_steps`, where the length of the run is that of its data.

    Args:
        rows: that an epoch trains on.

    Raises:
        ConfigError: nothing is left to train.
    """
    if training.max_steps > 0 or beginning.checkpoint is None or beginning.trained:
        return
    batch = training.train_batch_size * training.world_size
    batches = rows // batch if training.dataloader_drop_last else math.ceil(rows / batch)
    steps = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    if beginning.step >= math.ceil(training.num_train_epochs * steps):
        raise ConfigError(
            f"{beginning.checkpoint} has {beginning.step} steps already; --num_train_epochs "
            f"{training.num_train_epochs:g} leaves none, give more"
        )


def _say_which_rate(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Rates are the schedule's, and go on with it; if the checkpoint has one."""
    there = (read_record(checkpoint.parent) or {"settings": {}})["settings"].get("learning_rate")
    asked = settings["learning_rate"]
    if there not in (None, asked) and (checkpoint / OPTIMIZER_FILE).is_file():
        say(f"the learning rate goes on as in {checkpoint} ({there:g}); --learning_rate {asked:g} is for a new run")


def _family(optim: str) -> str:
    """Optimizers of one family can take over each other's state."""
    return "own" if optim in OWN_OPTIMIZERS else optim.removeprefix("paged_").replace("adamw_bnb_8bit", "adamw_8bit")


def _which(record: dict[str, Any] | None, other: str | None, last: Path | None) -> str:
    go_on = "go on with --resume_from_checkpoint last, " if last is not None else ""
    choose = f"{go_on}choose another directory"
    if record is None:
        return f"; {choose}"
    return (
        f" with other settings ({other}); {choose}"
        if other
        else ", finished with these settings; choose another directory"
    )


def _asked_for(wanted: Any, output_dir: Path) -> Path:
    if str(wanted).lower() in ("true", "last"):
        wanted = last_checkpoint(output_dir)
        if wanted is None:
            raise ConfigError(f"nothing to resume: {output_dir} holds no checkpoint; start without the flag")
    named = (Path(wanted), output_dir / wanted)
    checkpoint = next((path for path in named if (path / STATE_FILE).is_file()), None)
    if checkpoint is None:
        raise ConfigError(f"nothing to resume: {wanted} is not a trainer's checkpoint; name one, or `last`")
    fault = fault_of(checkpoint, complete=False)
    if fault is not None:
        raise CheckpointError(f"{checkpoint} is damaged or cut short ({fault}); resume from an earlier one by its name")
    return checkpoint
