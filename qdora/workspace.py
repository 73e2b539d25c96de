"""How much is unpacked and multiplied at once: the sizes of short-lived buffers, by the kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["ACCELERATOR", "CPU", "Workspace", "assume", "workspace_of"]


@dataclass(frozen=True)
class Workspace:
    """Sizes in bytes."""

    tile_bytes: int
    """Of one dequantized tile of a base weight."""


# 4 to 16 MiB measured alike (4096×11008, 1,024 tokens), 1 MiB and whole weights at up to twice the time.
CPU = Workspace(tile_bytes=8 * 2**20)
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
