"""In which dtype and on which device a model computes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import PartialState

from qdora.errors import ConfigError, reason

__all__ = ["compute_dtype", "pick_device", "usual_dtype"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compute_dtype(name: str, sixteen_bit: bool = False) -> torch.dtype:
    """
    Raises:
        ConfigError: not one of the three, or with `sixteen_bit` of the first two.
    """
    known = [dtype for dtype in _DTYPES if not sixteen_bit or dtype != "float32"]
    if name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, found {name!r}")
    return _DTYPES[name]


def usual_dtype(directory: Path, with_adapter: bool, device: torch.device) -> str:
    """bfloat16, in which adapters are trained; but weights in float16 would lose three bits by it.

    CPUs multiply in float16 ten times as slowly (512 × 576 × 1,536: 23 ms, and 6 in float32), so there it is float32.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if with_adapter or "float16" not in (config.get("dtype"), config.get("torch_dtype")):
        return "bfloat16"
    return "float32" if device.type == "cpu" else "float16"


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the accelerator, if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        return PartialState().device
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"no device {str(device)!r} here: {reason(error)}") from None
    return picked
