"""Dtypes by their names, and devices that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdora import ConfigError, NumericsError, arithmetic
from qdora.arithmetic import (
    compute_dtype,
    in_sixteen_bits,
    multiplies_bfloat16,
    pick_device,
    training_dtype,
    usual_dtype,
)


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
        ("bfloat16", False, "slow cpu", "float32"),
        ("float16", True, "slow cpu", "float32"),
        ("float32", False, "cuda", "bfloat16"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_that_loses_nothing(
    key: str,
    stored: str,
    with_adapter: bool,
    device: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda _: not device.startswith("slow"))
    (tmp_path / "config.json").write_text(json.dumps({key: stored}))
    assert usual_dtype(tmp_path, with_adapter, torch.device(device.removeprefix("slow "))) == expected


def test_who_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert multiplies_bfloat16(cpu) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert training_dtype(torch.device("cuda")) == "bfloat16"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bfloat16(cpu)
    assert training_dtype(cpu) == "float32"


def test_what_a_value_that_is_not_finite_is_blamed_on() -> None:
    ids = torch.arange(3)
    assert in_sixteen_bits("ids", ids, torch.float16) is ids
    assert torch.equal(in_sixteen_bits("w", torch.tensor([65504.0]), torch.float16), torch.tensor([65504.0]).half())
    with pytest.raises(NumericsError, match=r"^w is not finite in float16 \(its largest value is 1e\+05\); pass "):
        in_sixteen_bits("w", torch.tensor([-1e5, 2.0]), torch.float16)
    for value, dtype in [(float("inf"), torch.float16), (float("nan"), torch.float16), (3.4e38, torch.bfloat16)]:
        with pytest.raises(NumericsError, match=r"^w holds values that are not finite; the model or the adapter "):
            in_sixteen_bits("w", torch.tensor([1.0, value]), dtype)
