"""NF4 tiles against the format's definition in fp64, and quantization against bitsandbytes' own."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qdora.errors import CheckpointError
from qdora.nf4 import NF4Weight, is_nf4_key, quantize_nf4
from qdora.workspace import Workspace, assume
from tests.reference import nf4 as reference

SHAPES = [(96, 128), (50, 100), (7, 33), (64, 64), (3, 200), (130, 72)]


def random_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(out_features, in_features) * 0.05).to(dtype)


def truth(parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        offset = bnb.QuantState.from_dict({f"w.{k}": v for k, v in parts.items() if k}, device="cpu").offset
        absmax = reference.nested_absmax(absmax, parts["nested_quant_map"], parts["nested_absmax"], offset)
    return reference.dequantize(parts[""], absmax, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantize_is_code_times_absmax(shape: tuple[int, int], double_quant: bool) -> None:
    parts = quantize_nf4(random_weight(*shape), double_quant)
    weight = NF4Weight.from_tensors(parts)
    expected = truth(parts, shape)
    assert torch.allclose(weight.dequantize().double(), expected, rtol=1e-6, atol=1e-9)
    in_bf16 = weight.dequantize(torch.bfloat16).double()
    assert ((in_bf16 - expected).abs() <= 2**-8 * expected.abs() + 1e-9).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_of_any_size_give_the_same_weight(shape: tuple[int, int]) -> None:
    weight = NF4Weight.from_tensors(quantize_nf4(random_weight(*shape)))
    whole = weight.dequantize()
    scale = torch.randn(shape[0])
    for size in (1, 4 * 64 * shape[1], 10**9):
        with assume(Workspace(tile_bytes=size, reduce_bytes=1)):
            assert torch.equal(weight.dequantize(), whole)
            scaled = torch.cat([tile for _, tile in weight.tiles(torch.float32, scale)])
        assert torch.allclose(scaled, whole * scale[:, None], rtol=1e-6, atol=0)


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
    monkeypatch.setattr("qdora.nf4._QUANTIZED_AT_ONCE_BYTES", 4 * 64 * 10)
    for name, tensor in quantize_nf4(weight).items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_products_match_fp64(shape: tuple[int, int]) -> None:
    parts = quantize_nf4(random_weight(*shape))
    weight, W = NF4Weight.from_tensors(parts), truth(parts, shape)
    x, g = torch.randn(5, shape[1]), torch.randn(5, shape[0])
    scale = torch.rand(shape[0]) + 0.5
    scaled = W * scale.double()[:, None]

    def close(ours: Tensor, expected: Tensor) -> bool:
        return bool((ours.double() - expected).norm() <= 1e-5 * expected.norm())

    assert close(weight.linear(x), x.double() @ W.t())
    assert close(weight.linear(x, scale), x.double() @ scaled.t())
    assert close(weight.linear_transposed(g), g.double() @ W)
    assert close(weight.linear_transposed(g, scale), g.double() @ scaled)
    assert close(weight.row_norms_squared(), W.square().sum(dim=1))


def test_error_of_a_normal_weight_is_what_nf4_promises() -> None:
    original = random_weight(256, 1024)
    weight = NF4Weight.from_tensors(quantize_nf4(original))
    error = (weight.dequantize() - original).norm() / original.norm()
    assert 0.08 < error < 0.1


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
