"""Quantization against bitsandbytes' own, and what of a damaged file is refused."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qdora.errors import CheckpointError
from qdora.nf4 import NF4Weight
from qdora.nf4format import is_nf4_key, quantize_nf4
from tests.test_nf4 import random_weight


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_quantize_is_bitsandbytes_to_the_bit(double_quant: bool, dtype: torch.dtype) -> None:
    weight = random_weight(96, 128, dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    ours = quantize_nf4(weight, double_quant)
    assert torch.equal(ours[""], packed)
    theirs = state.as_dict(packed=True)
    assert ours.keys() == {"", *theirs}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_quantize_in_parts_is_quantize_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(100, 130)
    whole = quantize_nf4(weight)
    monkeypatch.setattr("qdora.nf4format._QUANTIZED_AT_ONCE_BYTES", 4 * 64 * 11)
    for name, tensor in quantize_nf4(weight).items():
        assert torch.equal(tensor, whole[name]), name


def test_refuses_what_is_not_nf4() -> None:
    packed, state = bnb.quantize_4bit(random_weight(64, 64), quant_type="fp4")
    with pytest.raises(CheckpointError, match="fp4"):
        NF4Weight(packed, state)
    packed, state = bnb.quantize_4bit(random_weight(64, 64), quant_type="nf4")
    with pytest.raises(CheckpointError, match="64×64"):
        NF4Weight(packed[:-1], state)


def test_keys_of_the_format() -> None:
    assert is_nf4_key("model.layers.0.mlp.up_proj.weight.absmax")
    assert is_nf4_key("a.weight.quant_state.bitsandbytes__nf4")
    assert not is_nf4_key("a.weight")
    assert not is_nf4_key("a.bias")


def test_every_key_that_is_written_is_a_key_of_the_format() -> None:
    for key in quantize_nf4(random_weight(64, 64)):
        assert is_nf4_key(f"a.weight.{key}") == bool(key)
        assert is_nf4_key(f"a.weight.b.weight.{key}") == bool(key)


def test_refuses_another_nested_blocksize() -> None:
    packed, state = bnb.quantize_4bit(random_weight(64, 64), quant_type="nf4", compress_statistics=True)
    state.state2.blocksize = 128
    with pytest.raises(CheckpointError, match="must be 256, found 128"):
        NF4Weight(packed, state)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("absmax", float("nan"), "negative, not finite or above"),
        ("absmax", 1e30, "negative, not finite or above"),
        ("absmax", -1.0, "negative, not finite or above"),
        ("quant_map", 0.5, "not NF4's"),
    ],
)
def test_refuses_scales_that_cannot_be(part: str, value: float, message: str) -> None:
    tensors = quantize_nf4(torch.randn(64, 64), double_quant=False)
    tensors[part] = tensors[part].clone()
    tensors[part][0] = value
    with pytest.raises(CheckpointError, match=message):
        NF4Weight.from_tensors(tensors)


@pytest.mark.parametrize("damage", ["short", "float64", "gone", "state"])
def test_refuses_what_does_not_fit_together(damage: str) -> None:
    tensors = quantize_nf4(torch.randn(64, 64))
    if damage == "short":
        tensors["nested_absmax"] = tensors["nested_absmax"][:0]
    elif damage == "float64":
        tensors["nested_absmax"] = tensors["nested_absmax"].double()
    elif damage == "gone":
        del tensors["quant_map"]
    else:
        tensors["quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(b"[" * 9999), dtype=torch.uint8)
    with pytest.raises(CheckpointError):
        NF4Weight.from_tensors(tensors)


def test_refuses_a_weight_that_is_not_finite() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        NF4Weight.from_tensors(quantize_nf4(torch.full((64, 64), float("nan"))))
