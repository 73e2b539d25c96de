"""NF4 base weights: packed 4-bit storage that is multiplied without ever being unpacked whole.

The idea. A weight of 4096 × 11008 is 22 MB in NF4 and 90 MB in bf16. Unpacking it whole costs those 90 MB for
every linear that is in flight, and a trip through memory that the multiplication then makes again. So the
weight is dequantized a *tile* of whole rows at a time into a buffer that fits in the cache, multiplied at once
and dropped. Forward, row norms and merge walk the same tiles; the transposed product has tiles of its own.

The constraint. NF4 stores one absmax for each 64 consecutive weights, counted through the flattened matrix. If
`in_features` is no multiple of 64, a block straddles two rows. A tile therefore takes a multiple of
64 / gcd(in_features, 64) rows, so that blocks never straddle tiles; only the very last tile may end inside a
block, and the packed bytes are padded once, at construction, so that it need not be treated apart.

The transposed product sums over rows, and a sum over tiles of rows would be rounded to bf16 once a tile. It walks tiles
of whole columns of blocks instead (their bytes are gathered first, a quarter of the tile), so that each result is one
sum: half the rounding error, and as fast as the dense product where the other was 7 % slower.

The row scale. DoRA multiplies each row of the weight by c = m/‖V‖. Where rows are whole blocks, the scale goes
into the absmax before dequantization: one multiply for 64 weights, and the tile comes out scaled. Otherwise the
tile is multiplied after it was dequantized. Either way no pass over the activations is needed.

The rejected alternative: bitsandbytes' own `Linear4bit.forward`. On a CPU with AVX512-BF16 it repacks the weight in
eval mode, after which `dequantize_4bit` of it is garbage (relative error 1.41), and it unpacks the weight whole.
Only its quantize and dequantize operators are used here, and those on whole blocks, as (blocks, 64) matrices: given a
matrix of 64 × 144, the CPU operator of bitsandbytes 0.50 on AVX512 is 21 % off, for it loses count of the blocks where
they straddle rows. `nf4format` is the door to bitsandbytes.

Several processes. FSDP2 shards parameters and leaves buffers whole, so the packed bytes and the absmax are parameters,
though nothing trains them: the absmax is 1/32 of the packed bytes (1/8 if it is not quantized itself), which, left
whole beside an eighth of the weights, would be a fifth of what a process holds. What quantizes the absmax is 1/2000 of
the packed bytes, and stays whole.

Shape suffixes: T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qdora.base import KeepsDtype
from qdora.errors import CheckpointError
from qdora.nf4format import NESTED_BLOCKSIZE, PackedLinear, QuantState, check_state, hollow_state, read_state
from qdora.workspace import workspace_of

__all__ = ["NF4Weight", "is_packed_linear"]

_DISGUISE = torch.float8_e5m2


class NF4Weight(KeepsDtype):
    """A frozen (out_features, in_features) weight in NF4.

    Behaves as the matrix it stands for: `linear`, `linear_transposed`, `row_norms_squared`, `dequantize`. Moves with
    its model between devices; a change of the model's dtype leaves it as it is.
    """

    quantized_from: torch.dtype
    """What the weights had been rounded to when they were quantized: fp16 gives other NF4 weights than bf16."""
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, packed: Tensor, state: QuantState) -> None:
        """
        Args:
            packed: uint8, two weights a byte, any shape; `out_features * in_features / 2` bytes.
            state: bitsandbytes' quant state, of type nf4, plain or double quantized.

        Raises:
            CheckpointError: no state, not nf4, the sizes disagree, or a scale is no number that a scale can be.
        """
        super().__init__()
        check_state(state)
        self.out_features, self.in_features = map(int, state.shape)
        self.blocksize, self.quantized_from = int(state.blocksize), state.dtype
        size = self.out_features * self.in_features
        blocks = math.ceil(size / self.blocksize)
        if packed.numel() * packed.element_size() != math.ceil(size / 2) or state.absmax.numel() != blocks:
            raise CheckpointError(
                f"a packed weight of {packed.numel()} bytes with {state.absmax.numel()} absmax values cannot be "
                f"{self.out_features}×{self.in_features} in blocks of {self.blocksize}"
            )
        flat = packed.detach().reshape(-1).view(torch.uint8)
        if flat.numel() != blocks * self.blocksize // 2:
            flat = nn.functional.pad(flat, (0, blocks * self.blocksize // 2 - flat.numel()))
        self.packed = nn.Parameter(flat, requires_grad=False)
        self.absmax = nn.Parameter(state.absmax, requires_grad=False)
        nested = state.state2
        self.register_buffer("nested_absmax", nested.absmax if nested is not None else None, persistent=False)
        self.register_buffer("nested_code", nested.code if nested is not None else None, persistent=False)
        self.register_buffer("nested_offset", state.offset if nested is not None else None, persistent=False)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> NF4Weight:
        """From a checkpoint's tensors, keyed `""` for the packed weight and `absmax`, `quant_map`, … for its state."""
        return cls(tensors[""], read_state(tensors))

    @classmethod
    def from_packed_linear(cls, linear: nn.Module) -> NF4Weight:
        """From one of bitsandbytes' `Linear4bit` modules, as transformers loads them; shares its memory.

        Raises:
            CheckpointError: it holds no NF4 weight; transformers leaves what lies in 16 bits as it is.
        """
        weight: Any = linear.weight
        return cls(weight.data, getattr(weight, "quant_state", None))

    @classmethod
    def hollow(cls, out_features: int, in_features: int, double_quant: bool = True) -> NF4Weight:
        """A weight of this shape without values, on the meta device: to reckon what one takes."""
        with torch.device("meta"):
            state = hollow_state(out_features, in_features, double_quant)
            return cls(torch.empty(math.ceil(out_features * in_features / 2), dtype=torch.uint8), state)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, blocksize={self.blocksize}"

    def pass_for_floats(self) -> None:
        """Let the bytes pass for 8-bit floats, in place, so that FSDP2 takes them.

        It makes each shard a parameter that might need a gradient and then says that it does not; torch 2.11 minds that
        in bytes, later ones do not. Nothing computes with the floats: they are bytes again where they are read.
        """
        for name in ("packed", "absmax"):
            tensor = getattr(self, name)
            if tensor.dtype == torch.uint8:
                setattr(self, name, nn.Parameter(tensor.detach().view(_DISGUISE), requires_grad=False))

    def block_absmax(self) -> Tensor:
        """(blocks,) fp32: the absmax of each block, the double quantization undone."""
        if self.nested_absmax is None:
            return self.absmax.float()
        plain = torch.ops.bitsandbytes.dequantize_blockwise(
            _as_bytes(self.absmax), self.nested_absmax, self.nested_code, NESTED_BLOCKSIZE, torch.float32
        )
        return plain.add_(self.nested_offset)

    def tiles(self, dtype: torch.dtype, row_scale_O: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Walk the weight in tiles of whole rows.

        Args:
            dtype: of the tiles: fp32, bf16 or fp16. The product code·absmax is rounded to it once.
            row_scale_O: fp32, multiplied into the rows.

        Yields:
            (rows, tile): which rows, and their weights as a (rows, in_features) tensor that lives until the next.
        """
        if (whole := self._only_tile(dtype, row_scale_O)) is not None:
            yield slice(0, self.out_features), whole
            return
        blocksize, in_features = self.blocksize, self.in_features
        packed, absmax = _as_bytes(self.packed), self.block_absmax()
        rows_are_blocks = in_features % blocksize == 0
        if row_scale_O is not None and rows_are_blocks:
            absmax = _scaled_rows(absmax, row_scale_O)
        for rows in self._tile_rows(dtype):
            start = rows.start * in_features // blocksize
            stop = math.ceil(rows.stop * in_features / blocksize)
            part = packed[start * blocksize // 2 : stop * blocksize // 2], absmax[start:stop]
            # No name here: it would keep a tile while the next is made.
            if rows_are_blocks:
                yield rows, self._unpack(*part, dtype).view(-1, in_features)
            else:
                yield rows, self._unpack_rows(rows, *part, dtype, row_scale_O)

    def column_tiles(self, dtype: torch.dtype, row_scale_O: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """As `tiles`, by columns: (columns, an (out_features, columns) tensor). Only where rows are whole blocks."""
        rows, blocksize = self.out_features, self.blocksize
        packed, absmax = _as_bytes(self.packed).view(rows, -1), self.block_absmax()
        if row_scale_O is not None:
            absmax = _scaled_rows(absmax, row_scale_O)
        absmax = absmax.view(rows, -1)
        for columns in workspace_of(self.device).cut(self.in_features, blocksize, rows, dtype):
            part = packed[:, columns.start // 2 : columns.stop // 2].contiguous().view(-1)
            blocks = slice(columns.start // blocksize, columns.stop // blocksize)
            scales = absmax[:, blocks].contiguous().view(-1)  # bitsandbytes does not look at strides
            yield columns, self._unpack(part, scales, dtype).view(rows, -1)

    def _tile_rows(self, dtype: torch.dtype) -> Iterator[slice]:
        unit = self.blocksize // math.gcd(self.in_features, self.blocksize)
        return workspace_of(self.device).cut(self.out_features, unit, self.in_features, dtype)

    def _unpack_rows(
        self, rows: slice, packed: Tensor, absmax: Tensor, dtype: torch.dtype, row_scale_O: Tensor | None
    ) -> Tensor:
        """Some rows out of blocks that straddle them, of which the last may be cut."""
        flat = self._unpack(packed, absmax, dtype).view(-1)[: (rows.stop - rows.start) * self.in_features]
        tile = flat.view(-1, self.in_features)
        return tile if row_scale_O is None else (tile * row_scale_O[rows, None]).to(dtype)

    def _unpack(self, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """Some blocks, (blocks, blocksize)."""
        shape = (absmax.shape[0], self.blocksize)
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, self.blocksize, "nf4", shape, dtype)

    def _only_tile(self, dtype: torch.dtype, row_scale_O: Tensor | None) -> Tensor | None:
        """The weight whole, (O, I), if it is no larger than a tile and its rows are whole blocks; else None.

        What `tiles` would give, but straight: in a small model half of what a linear costs is not arithmetic.
        """
        out_features, in_features = self.out_features, self.in_features
        too_large = dtype.itemsize * out_features * in_features > workspace_of(self.device).tile_bytes
        if too_large or in_features % self.blocksize:
            return None
        absmax = self.block_absmax()
        if row_scale_O is not None:
            absmax = _scaled_rows(absmax, row_scale_O)
        return self._unpack(_as_bytes(self.packed), absmax, dtype).view(out_features, in_features)

    def linear(self, x_TI: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        """x · (scale ⊙ W)ᵀ, as a (T, O) tensor of x's dtype."""
        if (W_OI := self._only_tile(x_TI.dtype, row_scale_O)) is not None:
            return x_TI @ W_OI.t()
        y_TO = x_TI.new_empty(x_TI.shape[0], self.out_features)
        for rows, tile in self.tiles(x_TI.dtype, row_scale_O):
            torch.mm(x_TI, tile.t(), out=y_TO[:, rows])
            del tile  # before the next is made: else there are two of them
        return y_TO

    def linear_transposed(self, g_TO: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        """g · (scale ⊙ W), as a (T, I) tensor of g's dtype: what `linear` needs in its backward."""
        if (W_OI := self._only_tile(g_TO.dtype, row_scale_O)) is not None:
            return g_TO @ W_OI
        dx_TI = g_TO.new_empty(g_TO.shape[0], self.in_features)
        if self.in_features % self.blocksize == 0:
            for columns, tile in self.column_tiles(g_TO.dtype, row_scale_O):
                torch.mm(g_TO, tile, out=dx_TI[:, columns])
                del tile
        else:
            for rows, tile in self.tiles(g_TO.dtype, row_scale_O):
                dx_TI.addmm_(g_TO[:, rows], tile, beta=int(rows.start > 0))  # beta 0 ignores what was there
                del tile
        return dx_TI

    def row_norms_squared(self) -> Tensor:
        """‖W‖² of each row, as an (O,) fp32 tensor."""
        norms = torch.empty(self.out_features, dtype=torch.float32, device=self.device)
        for rows, tile in self.tiles(torch.float32):
            norms[rows] = tile.square_().sum(dim=1)
        return norms

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, (O, I). For what needs the matrix: quantized products, tests, export."""
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        for rows, tile in self.tiles(dtype):
            whole[rows] = tile
        return whole


def _as_bytes(tensor: Tensor) -> Tensor:
    """Without their disguise, if they wear one."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def _scaled_rows(absmax: Tensor, row_scale_O: Tensor) -> Tensor:
    return (absmax.view(row_scale_O.shape[0], -1) * row_scale_O[:, None]).view(-1)


def is_packed_linear(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' 4-bit linear."""
    return isinstance(module, PackedLinear)
