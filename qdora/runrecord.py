"""Which run is in a directory: the record that a run leaves there, `qdora_train.json`, and how it is kept.

It is written when the training begins and again when all is done. It holds the settings and hashes of what is read
(data files whole, the base by its fingerprint), so that the same command on the same directory is known to be the same
run. A run that goes on from another one's checkpoint records that too: up to there, what the checkpoints say of where a
run ends is not of this one. Checkpoints that are no part of a run step aside; they are removed only if overwriting was
asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qdora.distributed import processes, say
from qdora.flags import RunArguments
from qdora.kept import checkpoints_in, discard, state_of, step_of
from qdora.output import UNFINISHED, read_object, write_json, writing
from qdora.shards import ShardReader, fingerprint

__all__ = [
    "RecordKeeper",
    "Start",
    "begin_record",
    "difference",
    "finish_record",
    "is_in",
    "read_record",
    "settings_of",
]

_RECORD_FILE = "qdora_train.json"
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


def begin_record(beginning: Start, output_dir: Path) -> None:
    """Say in the output directory which run is there, and clear away what is no part of it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for left in output_dir.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if beginning.checkpoint is None and not beginning.found:
        for checkpoint in checkpoints_in(output_dir):  # of the run that this one overwrites
            discard(checkpoint)
    elif not beginning.same:
        is_here = beginning.checkpoint is not None and is_in(Path(beginning.checkpoint), output_dir)
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


def settings_of(run: RunArguments, training: Any) -> dict[str, Any]:
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


def difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first settings that differ, in words; None if none does. What only one release knows does not count."""
    names = [name for name in here if name in there and name not in _NOT_COMPARED and there[name] != here[name]]
    words = [f"{name} {json.dumps(there[name])} there, {json.dumps(here[name])} here" for name in names[:3]]
    return "; ".join(words) + ("; …" if len(names) > 3 else "") if names else None


def read_record(output_dir: Path) -> dict[str, Any] | None:
    """The record in a directory, None without a usable one: `settings`, whether `finished`, and where it began."""
    record = read_object(output_dir / _RECORD_FILE)
    return record if isinstance(record.get("settings"), dict) and "finished" in record else None


def is_in(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is one of that directory's."""
    return checkpoint.resolve().parent == output_dir.resolve()
