"""Which sizes hold where."""

from __future__ import annotations

import pytest
import torch

from qdora.workspace import ACCELERATOR, CPU, Workspace, assume, blocks, workspace_of


def test_by_device() -> None:
    assert workspace_of(torch.device("cpu")) is CPU
    assert workspace_of(torch.device("cuda")) is ACCELERATOR


def test_assumed_ones_hold_within() -> None:
    small = Workspace(1024)
    with assume(small):
        with assume(ACCELERATOR):
            assert workspace_of(torch.device("cpu")) is ACCELERATOR
        assert workspace_of(torch.device("cuda")) is small
    assert workspace_of(torch.device("cpu")) is CPU


def widths(workspace: Workspace, size: int, values: int, dtype: torch.dtype, unit: int = 1) -> list[int]:
    tiles = list(workspace.cut(size, unit, values, dtype))
    assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
    assert tiles[-1].stop == size
    assert all(tile.start % unit == 0 for tile in tiles)
    return [tile.stop - tile.start for tile in tiles]


@pytest.mark.parametrize(("size", "values"), [(4096, 4096), (11008, 4096), (28672, 8192), (13824, 5120), (1025, 8000)])
def test_a_wide_product_in_16_bits_is_wide_enough_for_both_cores(size: int, values: int) -> None:
    for unit in (1, 64):
        found = widths(CPU, size, values, torch.bfloat16, unit)
        assert 1024 <= min(found) <= max(found) <= 1024 + 128
        assert 2 * values * max(found) <= 2 * CPU.tile_bytes


@pytest.mark.parametrize(("size", "values"), [(4096, 11008), (4096, 14336), (8192, 28672), (1536, 8192)])
def test_one_whose_tiles_would_be_too_large_is_narrow(size: int, values: int) -> None:
    assert set(widths(CPU, size, values, torch.float16, 64)) == {256}


def test_no_tile_is_empty_where_large_units_stay_together() -> None:
    assert widths(CPU, 1024, 14336, torch.bfloat16, unit=512) == [512, 512]


def test_in_32_bits_a_tile_is_what_fits() -> None:
    assert set(widths(CPU, 4096, 4096, torch.float32)) == {512}
    assert set(widths(CPU, 4096, 11008, torch.float32)) == {128, 192}  # 190 would fit
    assert set(widths(ACCELERATOR, 4096, 11008, torch.bfloat16)) == {2048}


def test_what_fits_stays_whole() -> None:
    assert widths(CPU, 576, 1536, torch.bfloat16) == [576]
    assert widths(CPU, 49152, 64, torch.float32) == [24576, 24576]


def test_units_stay_together_and_only_the_last_is_cut() -> None:
    assert widths(Workspace(tile_bytes=1), 50, 100, torch.float32, unit=16) == [16, 16, 16, 2]
    assert widths(Workspace(tile_bytes=4 * 100 * 32), 50, 100, torch.float32, unit=16) == [32, 18]


def test_elementwise_work_takes_as_many_rows_as_stay_in_the_cache() -> None:
    rows = CPU.block_bytes // (4 * 512)
    values = torch.empty(2 * rows + 3, 512, dtype=torch.bfloat16)
    sizes = [block.stop - block.start for block in blocks(values)]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == len(values)
    with assume(Workspace(tile_bytes=1, block_bytes=1)):
        assert list(blocks(values[:2])) == [slice(0, 1), slice(1, 2)]
    assert list(blocks(values[:9])) == [slice(0, 9)]
    assert list(blocks(values[:9], at_least=3)) == [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert list(blocks(values[:2], at_least=3)) == [slice(0, 1), slice(1, 2)]
    assert list(blocks(values[:0])) == list(blocks(values[:, :0])) == []
