"""How much is unpacked and multiplied at once: the sizes of short-lived buffers, by the kind of device.

A tile is as many rows of a weight, or columns, as fit in some bytes. On a CPU its width matters too: oneDNN gives some
products in 16 bits to one core alone. On two cores, for 384 to 1,792 tokens and sums of 4,096 values or more, it did so
at widths from 320 to 896, but not at 192 and 256, nor at 1,024 and more; 128 took up to five times as long, and a width
that is no multiple of 32 a fifth more. The down projection of a 7B model, 4096 × 11008, took 117 ms for 1,024 tokens in
tiles of 381 rows; it takes 58 in tiles of 256, and the dense product 39.

Work on single values goes a block of rows at a time: what one operation leaves is in the cache for the next, and
temporaries are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ACCELERATOR", "CPU", "WHOLE", "Workspace", "assume", "blocks", "workspace_of"]

_EVEN = 64
"""Where so many rows fit in a tile, it has a multiple of them."""


@dataclass(frozen=True)
class Workspace:
    """The sizes for one kind of device."""

    tile_bytes: int
    """Of one dequantized tile of a base weight, more or less."""
    narrow: int = 0
    wide: int = 0
    """The widths for products in 16 bits, where no wider tile fits: `wide`, if tiles then take about twice the bytes at
    most, else `narrow`, whatever that takes. Weights that fit whole are not cut."""
    block_bytes: int = 64 * 2**20
    """Of the rows that elementwise work takes at once, counted in fp32."""
    logits_bytes: int = 64 * 2**20
    """Of the logits that exist at once, if nothing else was asked for."""

    def cut(self, size: int, unit: int, values: int, dtype: torch.dtype) -> Iterator[slice]:
        """Cut a weight's rows into tiles of nearly the same width; or its columns.

        Args:
            size: how many there are.
            unit: so many stay together; only the last may be fewer.
            values: in each.
            dtype: of a tile.
        """
        fitting = self.tile_bytes // (dtype.itemsize * values)
        if fitting >= _EVEN:
            unit = math.lcm(unit, _EVEN)
        units, most = math.ceil(size / unit), max(1, round(fitting / unit))
        count = math.ceil(units / most)
        if dtype.itemsize == 2 and count > 1 and size < self.wide * count:
            as_wide = size // self.wide
            as_narrow = min(math.ceil(size / self.narrow), units)
            count = as_wide if as_wide and size <= 2 * fitting * as_wide else as_narrow
        return (slice(start * unit, min(stop * unit, size)) for start, stop in _spread(units, count))


# 4 to 16 MiB measured alike (4096×11008, 1,024 tokens), 1 MiB and whole weights at up to twice the time.
# What has more than 32 MiB, glibc asks the kernel for each time, which clears it.
CPU = Workspace(tile_bytes=8 * 2**20, narrow=256, wide=1024, block_bytes=2 * 2**20, logits_bytes=32 * 2**20)
# Reckoned, not yet measured: 8 MiB are too few rows to keep all processors of a large GPU busy, and each launch costs.
# For each chunk of logits the head's weight is read twice, a GB each with a vocabulary of 128k.
ACCELERATOR = Workspace(tile_bytes=64 * 2**20)
# For questions whose answer does not hang on the tiles: the fewer there are, the sooner it is known.
WHOLE = Workspace(tile_bytes=2**60, block_bytes=2**60)

_assumed: Workspace | None = None


def workspace_of(device: torch.device) -> Workspace:
    """The sizes to use on this device."""
    return _assumed or (CPU if device.type == "cpu" else ACCELERATOR)


def blocks(values: Tensor, at_least: int = 1) -> Iterator[slice]:
    """The rows of a matrix, as many at a time as elementwise work takes at once, in `at_least` so many parts.

    All of them under `torch.compile`, which fuses that work, and would unroll these and compile anew for each number.
    """
    rows, columns = values.shape
    if torch.compiler.is_compiling():
        return iter([slice(0, rows)])
    count = math.ceil(4 * rows * columns / workspace_of(values.device).block_bytes)
    parts = max(count, at_least) if count else 0
    return (slice(start, stop) for start, stop in _spread(rows, min(parts, rows)))


def _spread(units: int, count: int) -> Iterator[tuple[int, int]]:
    """Where each of `count` runs of nearly the same length begins and ends."""
    return ((units * run // count, units * (run + 1) // count) for run in range(count))


@contextmanager
def assume(workspace: Workspace) -> Iterator[None]:
    """Within it every device uses these sizes: to reckon on one device what another will do, and for tests."""
    global _assumed
    before, _assumed = _assumed, workspace
    try:
        yield
    finally:
        _assumed = before
