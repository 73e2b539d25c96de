"""The checkpoints of a run: which are whole, which are kept, and how one gets its name.

A checkpoint is written under `.unfinished/` and gets its name when it is complete and on the disk; one that is rotated
away loses its name before its files go. So what has the name is whole, and checking it here guards against damage that
others do. The names of the files in it are the trainer's.
"""

from __future__ import annotations

import errno
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import safe_open
from transformers import TrainerState

from qdora.errors import CheckpointError, reason
from qdora.output import UNFINISHED, flush, put_in_place

__all__ = [
    "OPTIMIZER_FILE",
    "SCHEDULE_FILE",
    "STATE_FILE",
    "checkpoint_of",
    "checkpoints_in",
    "clear_scratch",
    "discard",
    "fault_of",
    "keep_newest",
    "last_checkpoint",
    "name_checkpoint",
    "scratch_of",
    "state_of",
    "step_of",
    "way_back",
]

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE, SCHEDULE_FILE = "optimizer.pt", "scheduler.pt"
# What the machine says, rather than the file.
_NOT_DAMAGE = (errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


def fault_of(checkpoint: Path, complete: bool) -> str | None:
    """What is wrong with a checkpoint; None if it can be gone on from.

    Args:
        complete: open the adapter's files too, and miss what `--save_only_model` leaves out: without that a run does
            not end with the same bits.
    """
    random_states = list(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    states = [checkpoint / OPTIMIZER_FILE, checkpoint / SCHEDULE_FILE, *random_states]
    tensors = [checkpoint / "adapter_model.safetensors", *checkpoint.glob("magnitude_offsets.safetensors")]
    try:
        state_of(checkpoint)
        for path in tensors if complete else ():
            with safe_open(path, framework="pt"):
                pass
        for path in states if complete else filter(Path.is_file, states):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile(path.name)
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise CheckpointError(f"cannot read {checkpoint}: {reason(error)}; give the command again later") from None
        return reason(error)
    except Exception as error:
        # zipfile raises a dozen kinds of errors, and a damaged state as many again
        return reason(error)
    return None


def state_of(checkpoint: str | Path) -> TrainerState:
    """The trainer's state, as a checkpoint holds it."""
    return TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if there is one."""
    return next((path for path in reversed(checkpoints_in(output_dir)) if (path / STATE_FILE).is_file()), None)


def way_back(output_dir: Path) -> str:
    """How to go on from the last checkpoint, to end an error's sentence."""
    last = last_checkpoint(output_dir)
    if last is None:
        return "no checkpoint was written yet: begin anew"
    how = "--resume_from_checkpoint last (at the checkpoint's learning rate; another needs a new run)"
    return f"the last good checkpoint is {last}: go on with {how}"


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
    others = [path for path in checkpoints_in(output_dir) if path not in kept]
    for path in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
        discard(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, its name first."""
    nameless = scratch_of(checkpoint.parent) / checkpoint.name
    nameless.parent.mkdir(exist_ok=True)
    checkpoint.rename(nameless)
    clear_scratch(checkpoint.parent)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """What is called a checkpoint, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of)


def checkpoint_of(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return Path(output_dir) / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's directory is named after; -1 if it is named otherwise."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1
