"""Several processes that train as one: who speaks, how they end, and tensors of which each holds a part.

Who speaks. All processes read the same flags and the same data, so they find the same faults. Only the main one prints.

How they end. A launcher (torchrun, accelerate) ends every process as soon as one of them has failed. The main one says
what was wrong and leaves at once; another one waits for its end, and speaks only if none comes: then it was alone with
its fault. An error that nobody foresaw waits longer still, for it may be what a lost connection to the first to fail
looks like. The way out of a failure is `os._exit`: the others may be waiting in a collective that will never be
complete, and taking a process group apart waits for it.

After a success the process group is taken apart while nothing uses it any more. DDP's reducer must be gone by then:
were it the last to hold the group, its destructor would join gloo's threads while it holds Python's lock, which they
wait for.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

__all__ = [
    "bar",
    "gathered",
    "is_main",
    "local",
    "processes",
    "run_to_the_end",
    "say",
    "say_once",
    "spread_like",
    "summed",
    "whole",
]

_logger = logging.getLogger("qdora")
_PATIENCE_SECONDS = 5.0
Item = TypeVar("Item")


def processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, in the main process only."""
    if is_main():
        print(text, flush=True)


@cache
def say_once(line: str) -> None:
    """Warn of something in a library's way, once in a process and in the main process only."""
    if is_main():
        _logger.warning(f"qdora: {line}")


def bar(what: str, unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Goes through things with a bar that is gone at the end, in the main process and on a terminal only."""
    return lambda items: tqdm(items, desc=what, unit=f" {unit}", leave=False, disable=None if is_main() else True)


def run_to_the_end(verb: Callable[[], tuple[int, str]]) -> int:
    """Run a verb, say what was wrong if anything was, and end as one of several processes must.

    Args:
        verb: returns the exit status and a line for standard error.

    Returns:
        The exit status. With several processes, a failure does not return.
    """
    if processes() == 1:
        status, line = verb()
        _complain(line)
        return status
    turns = 0 if is_main() else 1
    try:
        status, line = verb()
    except Exception:
        status, line = 1, traceback.format_exc().rstrip()
        turns += 1
    if status == 0:
        _take_group_apart()
        return 0
    time.sleep(turns * _PATIENCE_SECONDS)
    _complain(line)
    sys.stdout.flush()
    os._exit(status)


def _complain(line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def _take_group_apart() -> None:
    gc.collect()  # the trainer and its reducer are in reference cycles
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or all of it. In place edits of it are edits of the tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. If it is sharded, every process must join in."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def summed(values: Tensor) -> Tensor:
    """Sum over all processes what each has, in place, and return it; every process must join in."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def gathered(item: Item) -> list[Item]:
    """What each process has, in the order of their ranks; every process must join in."""
    if not torch.distributed.is_initialized():
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def spread_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A tensor that every process has whole, sharded as `model` is; nothing is sent."""
    if not isinstance(model, DTensor) or isinstance(tensor, DTensor):
        return tensor
    placed = tensor.to(model.device_mesh.device_type)
    return distribute_tensor(placed, model.device_mesh, model.placements, src_data_rank=None)
