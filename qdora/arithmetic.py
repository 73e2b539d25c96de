"""In which dtype and on which device a model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from qdora.errors import ConfigError, NumericsError, reason

__all__ = [
    "compute_dtype",
    "in_sixteen_bits",
    "multiplies_bfloat16",
    "pick_device",
    "place_of",
    "training_dtype",
    "usual_dtype",
]

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


def in_sixteen_bits(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in bfloat16 or float16, to be written; whole numbers as they are.

    Args:
        name: of the tensor, for the error.

    Raises:
        NumericsError: it holds infinity or NaN, or would hold it then: float16 ends at 65,504.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        largest = tensor.float().abs().max().item()
        raise NumericsError(
            f"{name} is not finite in float16 (its largest value is {largest:.4g}); pass --dtype bfloat16"
            if dtype == torch.float16 and largest < float("inf")
            else f"{name} holds values that are not finite; the model or the adapter is damaged"
        )
    return cast


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a product in bf16 is fast there: on accelerators, and on CPUs of which oneDNN knows how.

    On others torch may take one number at a time for what a backward multiplies: with AVX2, g·W of 1,024 × 1,024 ×
    4,096 takes 18.8 s, and 0.07 s in fp32.
    """
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def training_dtype(device: torch.device) -> str:
    """bfloat16, where that is not slower than float32."""
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def usual_dtype(directory: Path, with_adapter: bool, device: torch.device) -> str:
    """The one in which adapters are trained; but weights in float16 would lose three bits in bfloat16.

    CPUs multiply in float16 more slowly (512 × 576 × 1,536: 23 ms, and 6 in float32), so there it is float32.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if with_adapter or "float16" not in (config.get("dtype"), config.get("torch_dtype")):
        return training_dtype(device)
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


def place_of(model: Any) -> torch.device:
    """Where a model's arithmetic is. Not `model.device`, which is the embedding's, and that may wait on the host."""
    return model.get_output_embeddings().weight.device
