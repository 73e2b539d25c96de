"""How much is unpacked and multiplied at once: the sizes of short-lived buffers, by the kind of device.

A tile is as many rows of a weight, or columns, as fit in some bytes. On a CPU its width matters too: oneDNN gives some
products in 16 bits to one core alone. On two cores, for 384 to 1,792 tokens and sums of 4,096 values or more, it did so
at widths from 320 to 896, but not at 192 and 256, nor at 1,024 and more; 128 took up to five times as long, and a width
that is no multiple of 32 a fifth more. The down projection of a 7B model, 4096 × 11008, took 117 ms for 1,024 tokens in
tiles of 381 rows; it takes 58 in tiles of 256, and the dense product 39.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["ACCELERATOR", "CPU", "Workspace", "assume", "workspace_of"]

_EVEN = 64
"""Widths are multiples of this, where tiles are as wide."""


@dataclass(frozen=True)
class Workspace:
    """The sizes for one kind of device."""

    tile_bytes: int
    """Of one dequantized tile of a base weight, more or less."""
    narrow: int = 0
    wide: int = 0
    """The widths for products in 16 bits, where no wider tile fits: `wide`, if that takes no more than twice the bytes,
    else `narrow`, whatever that takes."""

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
            count = as_wide if as_wide and size <= 2 * fitting * as_wide else math.ceil(size / self.narrow)
        edges = [min(units * tile // count * unit, size) for tile in range(count + 1)]
        return map(slice, edges[:-1], edges[1:])


# 4 to 16 MiB measured alike (4096×11008, 1,024 tokens), 1 MiB and whole weights at up to twice the time.
CPU = Workspace(tile_bytes=8 * 2**20, narrow=256, wide=1024)
# Reckoned, not yet measured: 8 MiB are too few rows to keep all processors of a large GPU busy, and each launch costs.
ACCELERATOR = Workspace(tile_bytes=64 * 2**20)

_assumed: Workspace | None = None


def workspace_of(device: torch.device) -> Workspace:
    """The sizes to use on this device."""
    return _assumed or (CPU if device.type == "cpu" else ACCELERATOR)


@contextmanager
def assume(workspace: Workspace) -> Iterator[None]:
    """Within it every device uses these sizes: to reckon on one device what another will do, and for tests."""
    global _assumed
    before, _assumed = _assumed, workspace
    try:
        yield
    finally:
        _assumed = before
