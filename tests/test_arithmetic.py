"""Dtypes by their names, and devices that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdora import ConfigError
from qdora.arithmetic import compute_dtype, pick_device, usual_dtype


def test_dtypes_and_devices() -> None:
    assert compute_dtype("float32") == torch.float32
    with pytest.raises(ConfigError, match="one of bfloat16, float16, found"):
        compute_dtype("float32", sixteen_bit=True)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no device 'warp' here"):
        pick_device("warp")


@pytest.mark.parametrize(
    ("stored", "with_adapter", "device", "expected"),
    [
        ("float16", False, "cuda", "float16"),
        ("float16", False, "cpu", "float32"),
        ("float16", True, "cuda", "bfloat16"),
        ("bfloat16", False, "cpu", "bfloat16"),
        ("float32", False, "cuda", "bfloat16"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_that_loses_nothing(
    key: str, stored: str, with_adapter: bool, device: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: stored}))
    assert usual_dtype(tmp_path, with_adapter, torch.device(device)) == expected
