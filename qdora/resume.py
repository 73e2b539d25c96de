"""Where a run goes on: the record that it leaves in its output directory, and which of its checkpoints are whole.

The record, `qdora_train.json`, is written when the training begins and again when all is done. It holds the settings
and hashes of what is read (data files whole, the base by its fingerprint), so that the same command on the same
directory is known to be the same run: unfinished, it goes on from its newest whole checkpoint; finished, or with other
settings or inputs, it is refused, as is a directory whose run left no record. A run that goes on from another one's
checkpoint records that too: up to there, what the checkpoints say of where a run ends is not of this one. Checkpoints
that are no part of a run step aside; they are removed only if overwriting was asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qdora.adapterfile import CONFIG_FILE
from qdora.distributed import processes, say
from qdora.errors import CheckpointError, ConfigError
from qdora.flags import OWN_OPTIMIZERS, RunArguments
from qdora.kept import OPTIMIZER_FILE, STATE_FILE, checkpoints_in, discard, fault_of, last_checkpoint, state_of, step_of
from qdora.output import UNFINISHED, read_object, write_json, writing
from qdora.shards import ShardReader, fingerprint

__all__ = [
    "RecordKeeper",
    "Start",
    "begin_record",
    "check_epochs",
    "finish_record",
    "start",
]

_RECORD_FILE = "qdora_train.json"
# Not settings of the training: where a run is, and how it and each of its processes were started.
_NOT_RECORDED = ("output_dir", "run_name", "resume_from_checkpoint", "local_rank")
_NOT_COMPARED = ("overwrite_output_dir",)
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


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    settings: dict[str, Any]
    checkpoint: str | None = None
    """To go on from."""
    same: bool = False
    """Whether that checkpoint is of a run with these very settings."""
    found: bool = False
    """Whether the directory holds this very run, unfinished."""
    began_from: str | None = None
    """The checkpoint of another run that this one went on from."""
    began_at: int = 0
    """How many steps that had."""
    measures_anew: bool = False
    """Whether evaluations of that one were of other data or by another metric, so that none is comparable."""

    @property
    def step(self) -> int:
        """Of that checkpoint."""
        return 0 if self.checkpoint is None else int(state_of(self.checkpoint).global_step)

    @property
    def trained(self) -> bool:
        """Whether nothing is left to train: the checkpoint is the last one, and the run ended while it was put away."""
        if self.checkpoint is None or not self.same:
            return False
        state = state_of(self.checkpoint)
        control: Any = state.stateful_callbacks.get("TrainerControl", {})
        stopped = isinstance(control, dict) and control.get("args", {}).get("should_training_stop", False)
        return bool(state.global_step >= state.max_steps or stopped)


def start(run: RunArguments, training: Any, output_dir: Path) -> Start:
    """Where a run with these flags begins in that directory, found before anything is written.

    Args:
        run, training: as `parse_train` returns them, before they are adapted to the machine.

    Raises:
        ConfigError: the directory holds an earlier run that this one would write over, or nothing to resume.
        CheckpointError: the checkpoint to resume is damaged.
    """
    settings = _settings(run, training)
    record = _read_record(output_dir)
    other = None if record is None else _difference(record["settings"], settings)
    asked = str(training.resume_from_checkpoint).lower()
    this = record if record is not None and not other else None
    unfinished = this if this is not None and not this["finished"] else None
    if asked not in ("none", "false"):
        checkpoint = _asked_for(training.resume_from_checkpoint, output_dir)
        _check_optimizer(checkpoint, settings)
        beginning = _from(checkpoint, settings, this if _is_in(checkpoint, output_dir) else None)
        _check_steps(beginning, training.max_steps)
        _say_which_rate(checkpoint, settings)
        if unfinished is not None and not beginning.same and unfinished.get("began_from") == beginning.began_from:
            return _newest(settings, output_dir, unfinished) or beginning  # the same command was given again
        if _is_in(checkpoint, output_dir):
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
    there = _read_record(checkpoint.parent)
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
    return _from(checkpoint, settings, record if _is_in(checkpoint, output_dir) else None)


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


def _is_in(checkpoint: Path, output_dir: Path) -> bool:
    return checkpoint.resolve().parent == output_dir.resolve()


def _check_optimizer(checkpoint: Path, settings: dict[str, Any]) -> None:
    """The state of one optimizer is none of another's, which would notice it late or never."""
    if not (checkpoint / OPTIMIZER_FILE).is_file():
        return
    begun = (_read_record(checkpoint.parent) or {"settings": {}})["settings"]
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
    there = (_read_record(checkpoint.parent) or {"settings": {}})["settings"].get("learning_rate")
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


def begin_record(beginning: Start, output_dir: Path) -> None:
    """Say in the output directory which run is there, and clear away what is no part of it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for left in output_dir.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if beginning.checkpoint is None and not beginning.found:
        for checkpoint in checkpoints_in(output_dir):  # of the run that this one overwrites
            discard(checkpoint)
    elif not beginning.same:
        is_here = beginning.checkpoint is not None and _is_in(Path(beginning.checkpoint), output_dir)
        _set_aside_after(beginning.began_at if is_here else -1, output_dir)
    _write_record(beginning, output_dir, finished=False)


def _write_record(beginning: Start, output_dir: Path, finished: bool) -> None:
    origin: dict[str, Any] = {}
    if beginning.began_from:
        origin = {"began_from": beginning.began_from, "began_at": beginning.began_at}
        origin |= {"measures_anew": True} if beginning.measures_anew else {}
    write_json(output_dir / _RECORD_FILE, {"finished": finished, **origin, "settings": beginning.settings})


def _set_aside_after(step: int, output_dir: Path) -> None:
    """Later checkpoints are damaged or of a course that was left: none may be taken for this run's newest."""
    for checkpoint in checkpoints_in(output_dir):
        if step_of(checkpoint) > step:
            aside = tempfile.mkdtemp(prefix=f"earlier-{checkpoint.name}-", dir=output_dir)
            checkpoint.rename(aside)
            say(f"{checkpoint} is no part of the run that goes on; it is {Path(aside).name} now")


def finish_record(beginning: Start, output_dir: Path) -> None:
    """The last that a run writes."""
    _write_record(beginning, output_dir, finished=True)


class RecordKeeper(TrainerCallback):
    """Writes the record again if the output directory was taken away during the training, and says so."""

    def __init__(self, beginning: Start) -> None:
        self._beginning = beginning

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        out = Path(args.output_dir)
        if state.is_world_process_zero and not (out / _RECORD_FILE).is_file():
            say(f"{out} was taken away since the training began; it was made again with checkpoint-{state.global_step}")
            with writing(out):
                _write_record(self._beginning, out, finished=False)


def _settings(run: RunArguments, training: Any) -> dict[str, Any]:
    """Every flag, as JSON has it; the number of processes, which makes the batch."""
    flags = {**training.to_dict(), **dataclasses.asdict(run), "processes": processes(), **_hashes(run, training)}
    plain: dict[str, Any] = json.loads(json.dumps(flags, default=str))
    return {name: value for name, value in sorted(plain.items()) if name not in _NOT_RECORDED}


def _hashes(run: RunArguments, training: Any) -> dict[str, str]:
    """Of the inputs that lie here as files; what the Hub gives is named by its id."""
    found, paths = {}, {"dataset": run.dataset, "eval_dataset": run.eval_dataset}
    paths["chat_template_path"] = training.chat_template_path
    for name, path in paths.items():
        if path and Path(path).is_file():
            with Path(path).open("rb") as content:
                found[f"{name}_sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
    if (Path(run.model_name_or_path) / "config.json").is_file():
        found["base_hash"] = fingerprint(ShardReader(run.model_name_or_path))
    return found


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first settings that differ, in words; None if none does. What only one release knows does not count."""
    names = [name for name in here if name in there and name not in _NOT_COMPARED and there[name] != here[name]]
    words = [f"{name} {json.dumps(there[name])} there, {json.dumps(here[name])} here" for name in names[:3]]
    return "; ".join(words) + ("; …" if len(names) > 3 else "") if names else None


def _read_record(output_dir: Path) -> dict[str, Any] | None:
    record = read_object(output_dir / _RECORD_FILE)
    return record if isinstance(record.get("settings"), dict) and "finished" in record else None
