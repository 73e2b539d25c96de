"""Where a run goes on: the record that it leaves in its output directory, and which of its checkpoints are whole.

The record, `qdora_train.json`, is written when the training begins and again when all is done. It holds the settings
and hashes of what is read (data files whole, the base by its fingerprint), so that the same command on the same
directory is known to be the same run: unfinished, it goes on from its newest whole checkpoint; finished, or with other
settings or inputs, it is refused, as is a directory whose run left no record.

A checkpoint is written under `.unfinished/` and gets its name when it is complete and on the disk; one that is rotated
away loses its name before its files go. So what has the name is whole, and checking it here guards against damage that
others do. The names of the files in it are the trainer's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerCallback, TrainerState

from qdora.distributed import processes, say
from qdora.errors import CheckpointError, ConfigError, reason
from qdora.flags import RunArguments
from qdora.output import UNFINISHED, flush, put_in_place, write_json, writing
from qdora.shards import ShardReader, fingerprint

__all__ = [
    "RECORD_FILE",
    "RecordKeeper",
    "Start",
    "begin_record",
    "clear_scratch",
    "finish_record",
    "keep_newest",
    "last_checkpoint",
    "name_checkpoint",
    "scratch_of",
    "start",
]

RECORD_FILE = "qdora_train.json"
_STATE_FILE = "trainer_state.json"
# Not settings of the training: where a run is, and how it and each of its processes were started.
_NOT_RECORDED = ("output_dir", "run_name", "resume_from_checkpoint", "local_rank")
_NOT_COMPARED = ("overwrite_output_dir",)


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    settings: dict[str, Any]
    checkpoint: str | None = None
    """To go on from."""
    same: bool = False
    """Whether that checkpoint is of a run with these very settings."""

    @property
    def trained(self) -> bool:
        """Whether nothing is left to train: the checkpoint is the last one, and the run ended while it was put away."""
        if self.checkpoint is None or not self.same:
            return False
        state = TrainerState.load_from_json(str(Path(self.checkpoint) / _STATE_FILE))
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
    if asked not in ("none", "false"):
        checkpoint = _asked_for(training.resume_from_checkpoint, output_dir)
        is_here = checkpoint.resolve().parent == output_dir.resolve()
        return Start(settings, str(checkpoint), same=is_here and record is not None and not other)
    if record is not None and not record["finished"] and not other:
        # If the run that is there was started without that flag, the flag asks for a new beginning.
        anew = run.overwrite_output_dir and not record["settings"].get("overwrite_output_dir")
        if not anew:
            return _go_on(settings, output_dir)
    if not run.overwrite_output_dir and (
        record or (output_dir / "adapter_config.json").is_file() or _named(output_dir)
    ):
        raise ConfigError(
            f"{output_dir} holds an earlier run{_which(record, other)}, or pass --overwrite_output_dir true"
        )
    return Start(settings)


def _go_on(settings: dict[str, Any], output_dir: Path) -> Start:
    for checkpoint in reversed(_named(output_dir)):
        fault = _fault(checkpoint, complete=True)
        if fault is None:
            say(f"{output_dir} holds this run unfinished; going on from {checkpoint.name}")
            return Start(settings, str(checkpoint), same=True)
        say(f"{checkpoint} is not whole ({fault}); looking for an earlier one")
    say(f"{output_dir} holds this run unfinished, without a whole checkpoint; starting from the beginning")
    return Start(settings)


def _which(record: dict[str, Any] | None, other: str | None) -> str:
    choose = "go on with --resume_from_checkpoint last, choose another directory"
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
    checkpoint = Path(wanted)
    if not (checkpoint / _STATE_FILE).is_file():
        raise ConfigError(f"nothing to resume: {wanted} is not a trainer's checkpoint; name one, or `last`")
    fault = _fault(checkpoint, complete=False)
    if fault is not None:
        raise CheckpointError(f"{checkpoint} is damaged or cut short ({fault}); resume from an earlier one by its name")
    return checkpoint


def _fault(checkpoint: Path, complete: bool) -> str | None:
    """What is wrong with a checkpoint; None if it can be gone on from.

    Args:
        complete: what `--save_only_model` leaves out is a fault too, for the run would not end with the same bits.
    """
    random_states = list(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random_states]
    tensors = [checkpoint / "adapter_model.safetensors", *checkpoint.glob("magnitude_offsets.safetensors")]
    try:
        TrainerState.load_from_json(str(checkpoint / _STATE_FILE))
        for path in tensors if complete else ():
            with safe_open(path, framework="pt"):
                pass
        for path in states if complete else filter(Path.is_file, states):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile(path.name)
    except Exception as error:
        # zipfile raises a dozen kinds of errors, and a damaged state as many again
        return reason(error)
    return None


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if there is one."""
    return next((path for path in reversed(_named(output_dir)) if (path / _STATE_FILE).is_file()), None)


def begin_record(beginning: Start, output_dir: Path) -> None:
    """Say in the output directory which run is there, and clear away what is no part of it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for left in output_dir.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if beginning.checkpoint is None:
        for checkpoint in _named(output_dir):  # of the run that this one overwrites, or cut short
            _discard(checkpoint)
    elif not beginning.same:
        _set_aside_after(_step_of(Path(beginning.checkpoint)), output_dir)
    write_json(output_dir / RECORD_FILE, {"finished": False, "settings": beginning.settings})


def _set_aside_after(step: int, output_dir: Path) -> None:
    """Later checkpoints are of the course that was left: none may be taken for this run's newest."""
    for checkpoint in _named(output_dir):
        if _step_of(checkpoint) > step:
            aside = tempfile.mkdtemp(prefix=f"earlier-{checkpoint.name}-", dir=output_dir)
            checkpoint.rename(aside)
            say(f"{checkpoint} is of the run with the earlier settings; it is {Path(aside).name} now")


def finish_record(beginning: Start, output_dir: Path) -> None:
    """The last that a run writes."""
    write_json(output_dir / RECORD_FILE, {"finished": True, "settings": beginning.settings})


class RecordKeeper(TrainerCallback):
    """Writes the record again if the output directory was taken away during the training, and says so."""

    def __init__(self, beginning: Start) -> None:
        self._beginning = beginning

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        out = Path(args.output_dir)
        if state.is_world_process_zero and not (out / RECORD_FILE).is_file():
            say(f"{out} was taken away since the training began; it was made again with checkpoint-{state.global_step}")
            with writing(out):
                write_json(out / RECORD_FILE, {"finished": False, "settings": self._beginning.settings})


def scratch_of(output_dir: Path) -> Path:
    """Where checkpoints are written, the same for all processes."""
    return output_dir / UNFINISHED


def clear_scratch(output_dir: Path) -> None:
    """Remove what is there, as far as that is possible."""
    shutil.rmtree(scratch_of(output_dir), ignore_errors=True)


def name_checkpoint(scratch: Path, checkpoint: Path) -> None:
    """Give a complete checkpoint its name, once it is on the disk."""
    flush(scratch)
    put_in_place(scratch, checkpoint)


def keep_newest(output_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Remove checkpoints until `limit` are left, the oldest first, the newest and the best never."""
    if limit is None or limit <= 0:
        return
    kept = {newest, *([] if best is None else [Path(best)])}
    others = [path for path in _named(output_dir) if path not in kept]
    for path in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
        _discard(path)


def _discard(checkpoint: Path) -> None:
    nameless = scratch_of(checkpoint.parent) / checkpoint.name
    nameless.parent.mkdir(exist_ok=True)
    checkpoint.rename(nameless)
    clear_scratch(checkpoint.parent)


def _named(output_dir: Path) -> list[Path]:
    """What is called a checkpoint, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    """-1 if it is not called after one."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def _settings(run: RunArguments, training: Any) -> dict[str, Any]:
    """Every flag, as JSON has it; the number of processes, which makes the batch."""
    flags = {**training.to_dict(), **dataclasses.asdict(run), "processes": processes(), **_hashes(run)}
    plain: dict[str, Any] = json.loads(json.dumps(flags, default=str))
    return {name: value for name, value in sorted(plain.items()) if name not in _NOT_RECORDED}


def _hashes(run: RunArguments) -> dict[str, str]:
    """Of the inputs that lie here as files; what the Hub gives is named by its id."""
    found = {}
    for name in ("dataset", "eval_dataset"):
        path = getattr(run, name)
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
    try:
        record = json.loads((output_dir / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and isinstance(record.get("settings"), dict) and "finished" in record
    return record if known else None
