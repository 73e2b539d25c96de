"""Quantization against bitsandbytes' own, and what of a damaged file is refused."""

from __future__ import annotations

import re
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from qdora.errors import CheckpointError
from qdora.nf4 import NF4Weight
from qdora.nf4format import is_nf4_key, quantize_nf4, states_by_weight
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


def test_the_states_of_a_checkpoint_by_weight() -> None:
    keys = [
        "a.weight",
        "a.weight.absmax",
        "b.weight.c.weight",
        "b.weight.c.weight.quant_map",
        "a.weight.quant_map",
        "d.bias",
    ]
    assert states_by_weight(keys) == {
        "a.weight": ["a.weight.absmax", "a.weight.quant_map"],
        "b.weight.c.weight": ["b.weight.c.weight.quant_map"],
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shape", None, "an NF4 weight must be a matrix, found the shape None; quantize the model again"),
        ("shape", (4096,), "an NF4 weight must be a matrix, found the shape (4096,); quantize the model again"),
        ("shape", (0, 64), "an NF4 weight must be a matrix, found the shape (0, 64); quantize the model again"),
        ("blocksize", 63, "blocks of 63 weights are unknown; quantize the model again"),
        ("blocksize", 64.0, "blocks of 64.0 weights are unknown; quantize the model again"),
        ("dtype", torch.int8, "an NF4 weight of torch.int8 is unknown; quantize the model again"),
        ("dtype", "bfloat16", "an NF4 weight of 'bfloat16' is unknown; quantize the model again"),
        (
            "offset",
            torch.zeros((), dtype=torch.float64),
            "what quantizes an NF4 weight's absmax must be float32; quantize the model again",
        ),
        (
            "absmax",
            torch.zeros(64),
            "the absmax of an NF4 weight does not fit what quantizes it; quantize the model again",
        ),
        ("code", torch.zeros(16), "the values of an NF4 weight are not NF4's; quantize the model again"),
        (
            "offset",
            torch.tensor(-1.0),
            "an absmax of an NF4 weight is negative, not finite or above 65504; the checkpoint is damaged, "
            "quantize the model again",
        ),
    ],
)
def test_refuses_a_state_that_describes_no_weight(name: str, value: Any, message: str) -> None:
    packed, state = bnb.quantize_4bit(random_weight(64, 64), quant_type="nf4", compress_statistics=True)
    setattr(state, name, value)
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        NF4Weight(packed, state)


def test_refuses_a_weight_without_a_state() -> None:
    message = "^a linear that should be in NF4 has no quant state; quantize the model again$"
    with pytest.raises(CheckpointError, match=message):
        NF4Weight(torch.zeros(2048, dtype=torch.uint8), None)


def test_refuses_a_code_of_the_absmax_beyond_one() -> None:
    tensors = quantize_nf4(random_weight(64, 64))
    tensors["nested_quant_map"] = tensors["nested_quant_map"] * 1.5
    message = "^the code of an NF4 weight's absmax reaches beyond 1; quantize the model again$"
    with pytest.raises(CheckpointError, match=message):
        NF4Weight.from_tensors(tensors)


def test_takes_what_is_unusual_and_right() -> None:
    one_row, zeros = random_weight(1, 64), torch.zeros(64, 64)
    assert NF4Weight.from_tensors(quantize_nf4(one_row)).out_features == 1
    assert torch.equal(NF4Weight.from_tensors(quantize_nf4(zeros, double_quant=False)).dequantize(), zeros)
    tensors = quantize_nf4(random_weight(64, 64))
    tensors["quant_map"] = tensors["quant_map"].bfloat16().float()  # up to a thousandth and a half off
    with pytest.raises(CheckpointError, match="not NF4's"):
        NF4Weight.from_tensors(tensors)
    tensors["quant_map"] = quantize_nf4(random_weight(64, 64))["quant_map"].half().float()
    NF4Weight.from_tensors(tensors)


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("short", "does not fit what quantizes it"),
        ("float64", "must be float32"),
        ("gone", "cannot be read: .*quant_map"),
        ("state", "cannot be read: .*[a-z]"),
    ],
)
def test_refuses_what_does_not_fit_together(damage: str, message: str) -> None:
    tensors = quantize_nf4(torch.randn(64, 64))
    if damage == "short":
        tensors["nested_absmax"] = tensors["nested_absmax"][:0]
    elif damage == "float64":
        tensors["nested_absmax"] = tensors["nested_absmax"].double()
    elif damage == "gone":
        del tensors["quant_map"]
    else:
        tensors["quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(b"[" * 9999), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=message):
        NF4Weight.from_tensors(tensors)


def test_refuses_a_weight_that_is_not_finite() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        NF4Weight.from_tensors(quantize_nf4(torch.full((64, 64), float("nan"))))
