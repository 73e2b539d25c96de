"""NF4 tiles against the format's definition in fp64."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from torch import Tensor

import qdora
from qdora import CheckpointError
from qdora.nf4 import NF4Weight, is_packed_linear
from qdora.nf4format import quantize_nf4
from qdora.shards import ShardReader
from qdora.workspace import Workspace, assume
from tests.reference import nf4 as reference

ONE_ROW, WHOLE = Workspace(tile_bytes=1), Workspace(tile_bytes=10**9)
"""In tiles as small as they can be, and in one."""
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
        with assume(Workspace(tile_bytes=size)):
            assert torch.equal(weight.dequantize(), whole)
            scaled = torch.cat([tile for _, tile in weight.tiles(torch.float32, scale)])
        assert torch.allclose(scaled, whole * scale[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("workspace", [ONE_ROW, WHOLE])
def test_products_match_fp64(shape: tuple[int, int], workspace: Workspace) -> None:
    parts = quantize_nf4(random_weight(*shape))
    weight, W = NF4Weight.from_tensors(parts), truth(parts, shape)
    x, g = torch.randn(5, shape[1]), torch.randn(5, shape[0])
    scale = torch.rand(shape[0]) + 0.5
    scaled = W * scale.double()[:, None]

    def close(ours: Tensor, expected: Tensor) -> bool:
        return bool((ours.double() - expected).norm() <= 1e-5 * expected.norm())

    with assume(workspace):
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


def test_weights_packed_in_another_dtype_are_the_same_bytes() -> None:
    packed, state = bnb.quantize_4bit(random_weight(96, 128), quant_type="nf4", quant_storage=torch.bfloat16)
    plain = NF4Weight.from_tensors(quantize_nf4(random_weight(96, 128), double_quant=False))
    assert torch.equal(NF4Weight(packed, state).dequantize(), plain.dequantize())


def test_the_bytes_are_padded_to_whole_blocks_and_no_further() -> None:
    weight = NF4Weight.from_tensors(quantize_nf4(random_weight(7, 33)))
    assert weight.packed.numel() == 4 * 64 // 2
    assert weight.state_dict().keys() == {"packed", "absmax"}


def packed_linear(weight: Tensor, bias: bool = False) -> Linear4bit:
    linear = Linear4bit(weight.shape[1], weight.shape[0], bias=bias, quant_type="nf4")
    linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    return linear.to("cpu")  # this quantizes


def test_a_packed_linear_is_shared() -> None:
    original = random_weight(96, 128)
    linear = packed_linear(original)
    assert is_packed_linear(linear)
    assert not is_packed_linear(torch.nn.Linear(2, 2))
    weight = NF4Weight.from_packed_linear(linear)
    assert torch.equal(weight.dequantize(), NF4Weight.from_tensors(quantize_nf4(original)).dequantize())
    assert weight.packed.data_ptr() == linear.weight.data_ptr()


def layout(weight: NF4Weight) -> dict[str, tuple[torch.Size, torch.dtype]]:
    tensors = {**dict(weight.named_parameters()), **dict(weight.named_buffers())}
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [*SHAPES, (130, 200)])
def test_a_hollow_weight_has_the_layout_of_a_real_one(shape: tuple[int, int]) -> None:
    for double_quant in (True, False):
        real = NF4Weight.from_tensors(quantize_nf4(random_weight(*shape), double_quant))
        with torch.device("meta"):
            hollow = NF4Weight.hollow(*shape, double_quant)
        assert layout(hollow) == layout(real)
        assert hollow.extra_repr() == real.extra_repr()
        assert {tensor.device.type for tensor in hollow.state_dict().values()} == {"meta"}
    assert layout(NF4Weight.hollow(*shape)) == layout(NF4Weight.from_tensors(quantize_nf4(random_weight(*shape))))


def test_bytes_that_pass_for_floats_are_the_same_bytes() -> None:
    for double_quant in (True, False):
        weight = NF4Weight.from_tensors(quantize_nf4(random_weight(96, 128), double_quant))
        before, address = weight.dequantize(), weight.packed.data_ptr()
        weight.pass_for_floats()
        assert weight.packed.dtype == torch.float8_e5m2
        assert weight.absmax.dtype == (torch.float8_e5m2 if double_quant else torch.float32)
        for workspace in (ONE_ROW, WHOLE):
            with assume(workspace):
                assert torch.equal(weight.dequantize(), before)
        assert weight.packed.data_ptr() == address
        assert not any(parameter.requires_grad for parameter in weight.parameters())


@pytest.mark.parametrize("shape", [(96, 192), (50, 100), (7, 33)])
def test_tiles_take_turns_and_no_more_room_than_they_must(shape: tuple[int, int]) -> None:
    weight = NF4Weight.from_tensors(quantize_nf4(random_weight(*shape)))
    whole, scale = weight.dequantize(), torch.rand(shape[0]) + 0.5
    unit = {192: 1, 100: 16, 33: 64}[shape[1]]
    for units in (0, 1, 3, 99):
        with assume(Workspace(tile_bytes=units * unit * shape[1] * 4)):
            rows = [rows for rows, _ in weight.tiles(torch.float32)]
        assert all(tile.start % unit == 0 for tile in rows)
        assert max(tile.stop - tile.start for tile in rows) <= max(units, 1) * unit
        assert [tile.start for tile in rows] == [0, *(tile.stop for tile in rows[:-1])]
        assert (len(rows), rows[-1].stop) == (math.ceil(shape[0] / (max(units, 1) * unit)), shape[0])
    if shape[1] % 64:
        return
    (columns, _), *others = weight.column_tiles(torch.float32)  # in the usual workspace
    assert (columns.start, columns.stop, others) == (0, shape[1], [])
    for units in (0, 1, 2, 9):
        with assume(Workspace(tile_bytes=units * 64 * shape[0] * 4)):
            columns, tiles = zip(*weight.column_tiles(torch.float32, scale), strict=True)
        assert all(tile.shape == (shape[0], each.stop - each.start) for each, tile in zip(columns, tiles, strict=True))
        assert max(tile.shape[1] for tile in tiles) <= max(units, 1) * 64
        assert [each.start for each in columns] == [0, *(each.stop for each in columns[:-1])]
        assert (len(columns), columns[-1].stop) == (math.ceil(shape[1] / (max(units, 1) * 64)), shape[1])
        assert torch.allclose(torch.cat(tiles, dim=1), whole * scale[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("workspace", [ONE_ROW, WHOLE])
def test_a_scale_that_rides_in_the_absmax_is_not_rounded_by_itself(workspace: Workspace) -> None:
    """bf16 rounds by half of 2⁻⁷ at most: once where rows are blocks, and once more where the tile is scaled after."""
    for shape, roundings in [((96, 128), 1), ((50, 100), 2)]:
        parts = quantize_nf4(random_weight(*shape))
        scale = torch.rand(shape[0]) + 0.5
        exact = truth(parts, shape) * scale.double()[:, None]
        with assume(workspace):
            for rows, tile in NF4Weight.from_tensors(parts).tiles(torch.bfloat16, scale):
                assert tile.dtype == torch.bfloat16
                error = (tile.double() - exact[rows]).abs()
                assert (error <= 1.001 * roundings * 2**-8 * exact[rows].abs()).all()


def test_the_transposed_product_is_rounded_once() -> None:
    weight = NF4Weight.from_tensors(quantize_nf4(random_weight(256, 128)))
    g = torch.randn(32, 256).bfloat16()
    exact = g.double() @ weight.dequantize(torch.bfloat16).double()
    with assume(Workspace(tile_bytes=1)):
        ours = weight.linear_transposed(g)
    assert (ours.double() - exact).norm() < 4e-3 * exact.norm()


def test_everything_happens_on_the_weight_s_device_and_in_its_dtype() -> None:
    parts = quantize_nf4(random_weight(96, 128))
    assert "nested_absmax" in parts
    there = {name: part if name.startswith("quant_state") else part.to("meta") for name, part in parts.items()}
    weight = NF4Weight.from_tensors(there)
    assert {tensor.device.type for tensor in (*weight.parameters(), *weight.buffers())} == {"meta"}
    assert weight.dequantize().device.type == weight.row_norms_squared().device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta"):  # quantized there, it has no values to bring back
        quantize_nf4(random_weight(64, 64), device="meta")


def test_the_default_dtype_does_not_matter() -> None:
    weight = NF4Weight.from_tensors(quantize_nf4(random_weight(96, 128)))
    try:
        torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
        assert weight.row_norms_squared().dtype == torch.float32
        assert weight.dequantize().dtype == torch.float32
        assert weight.dequantize(torch.float16).dtype == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_linear_in_16_bits_where_the_config_says_nf4(tiny: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    model, key = shutil.copytree(tiny_nf4, tmp_path / "nf4"), "model.layers.0.mlp.down_proj.weight"
    (file,) = model.glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(key)}
    save_file({**tensors, key: ShardReader(tiny).get(key)}, file, {"format": "pt"})
    for settings in ({}, {"stream_base": True}):
        with pytest.raises(CheckpointError, match=r"^a linear that should be in NF4 has no quant state; quantize the"):
            qdora.load_model(model, **settings)
