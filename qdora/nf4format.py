"""NF4 as it is stored: a weight is written in it, and nothing is believed that a file says of one.

Format: what transformers writes for bitsandbytes (`weight`, `weight.absmax`, `weight.quant_map`,
`weight.nested_absmax`, `weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4`). NF4 itself: QLoRA,
arXiv 2305.14314, section 3; double quantization: the absmax of 64 weights less their mean, in 8 bits with one
fp32 absmax for each 256 of them.

What a state says comes out of a file, as JSON in a tensor, and bitsandbytes believes all of it. So each part is looked
at here, once, as a weight is made, before anything is computed with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# On import, its CPU backend advises an optional package for a kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit as PackedLinear
from torch import Tensor

from qdora.errors import CheckpointError, reason

__all__ = [
    "BLOCKSIZE",
    "LARGEST_SCALE",
    "NESTED_BLOCKSIZE",
    "PackedLinear",
    "QuantState",
    "check_state",
    "hollow_state",
    "is_nf4_key",
    "quantize_nf4",
    "read_state",
    "states_by_weight",
]

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
_QUANTIZED_AT_ONCE_BYTES = 8 * 2**20
# What bitsandbytes quantizes in; and fp16's largest number, which no weight that was trained comes near.
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_SCALE = 65504.0
"""The largest absmax that is believed, which in fp16 is still finite."""
_STATE_KEY = "quant_state.bitsandbytes__nf4"


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """bitsandbytes makes codes and offsets in torch's default dtype, which transformers changes as it builds models."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@_float32_by_default()
def quantize_nf4(weight: Tensor, double_quant: bool = True, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Quantize a weight to NF4 in blocks of 64, a tile at a time.

    Args:
        weight: (out_features, in_features), fp32, bf16 or fp16.
        double_quant: store the absmax in 8 bits as well.
        device: where a tile is quantized; the result is on the CPU.

    Returns:
        The tensors of the bitsandbytes format, keyed by what follows `weight.` in a checkpoint: `""` is the packed
        weight, (n/2, 1) uint8. `NF4Weight.from_tensors` and transformers read them.
    """
    flat = weight.reshape(-1)
    step = _QUANTIZED_AT_ONCE_BYTES // BLOCKSIZE * BLOCKSIZE // 4
    parts = [
        torch.ops.bitsandbytes.quantize_4bit(part.to(device), BLOCKSIZE, "nf4", torch.uint8)
        for part in flat.split(step)
    ]
    packed = torch.cat([part.cpu() for part, _ in parts])
    absmax = torch.cat([part.cpu().float() for _, part in parts])
    state = QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCKSIZE,
        quant_type="nf4",
        dtype=weight.dtype,
    )
    if double_quant:
        state.offset = absmax.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=NESTED_BLOCKSIZE)
        state.nested = True
    stats: dict[str, Any] = state.as_dict(packed=True)
    return {"": packed, **stats}


def check_state(state: Any) -> None:
    """What a damaged checkpoint may say of a packed weight; whether its size fits is checked with the weight.

    Raises:
        CheckpointError: it describes no NF4 weight.
    """
    if not isinstance(state, QuantState):
        raise CheckpointError("a linear that should be in NF4 has no quant state; quantize the model again")
    if state.quant_type != "nf4":
        raise CheckpointError(f"base weights must be nf4, found {state.quant_type!r}; quantize the model again")
    if state.shape is None or len(state.shape) != 2 or min(state.shape) < 1:
        raise CheckpointError(
            f"an NF4 weight must be a matrix, found the shape {state.shape}; quantize the model again"
        )
    if type(state.blocksize) is not int or state.blocksize not in _BLOCKSIZES:
        raise CheckpointError(f"blocks of {state.blocksize!r:.40} weights are unknown; quantize the model again")
    if not (isinstance(state.dtype, torch.dtype) and state.dtype.is_floating_point):
        raise CheckpointError(f"an NF4 weight of {state.dtype!r:.40} is unknown; quantize the model again")
    nested = state.state2
    if nested is None:
        scales = [state.absmax]
    else:
        if nested.blocksize != NESTED_BLOCKSIZE:
            raise CheckpointError(f"nested blocksize must be {NESTED_BLOCKSIZE}, found {nested.blocksize!r:.40}")
        blocks = math.ceil(state.absmax.numel() / NESTED_BLOCKSIZE)
        scales = [nested.absmax, state.offset]
        if any(scale.dtype != torch.float32 for scale in scales):
            raise CheckpointError("what quantizes an NF4 weight's absmax must be float32; quantize the model again")
        if state.absmax.element_size() != 1 or nested.absmax.numel() != blocks or nested.code.numel() != 256:
            raise CheckpointError(
                "the absmax of an NF4 weight does not fit what quantizes it; quantize the model again"
            )
    if state.absmax.device.type != "meta":
        _check_values(state.code, None if nested is None else nested.code, scales)


@_float32_by_default()
def _check_values(code: Tensor, nested_code: Tensor | None, scales: list[Tensor]) -> None:
    usual = bnb.get_4bit_type("nf4", device=code.device)
    if code.shape != usual.shape or not torch.allclose(code.float(), usual, atol=1e-3):
        raise CheckpointError("the values of an NF4 weight are not NF4's; quantize the model again")
    for scale in scales:
        if not (scale.is_floating_point() and bool(((scale >= 0) & (scale <= LARGEST_SCALE)).all())):
            raise CheckpointError(
                f"an absmax of an NF4 weight is negative, not finite or above {LARGEST_SCALE:g}; the checkpoint is "
                "damaged, quantize the model again"
            )
    if nested_code is not None and not bool((nested_code.abs() <= 1).all()):
        raise CheckpointError("the code of an NF4 weight's absmax reaches beyond 1; quantize the model again")


def read_state(tensors: Mapping[str, Tensor]) -> QuantState:
    """A weight's quant state from a checkpoint's tensors, keyed as `quantize_nf4` returns them. Not checked yet.

    Raises:
        CheckpointError: it is no quant state.
    """
    stats = {f"weight.{key}": value for key, value in tensors.items() if key}
    try:
        with _float32_by_default():
            return QuantState.from_dict(stats, device=tensors[""].device)
    except Exception as error:
        # the state is JSON in a tensor, of which bitsandbytes believes everything
        raise CheckpointError(f"the quant state of an NF4 weight cannot be read: {reason(error)}") from None


def hollow_state(out_features: int, in_features: int, double_quant: bool) -> QuantState:
    """The quant state of a weight of this shape, without values, on torch's default device."""
    blocks = math.ceil(out_features * in_features / BLOCKSIZE)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        shape=torch.Size((out_features, in_features)),
        blocksize=BLOCKSIZE,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    if double_quant:
        nested_absmax = torch.empty(math.ceil(blocks / NESTED_BLOCKSIZE))
        state.state2 = QuantState(absmax=nested_absmax, code=torch.empty(256), blocksize=NESTED_BLOCKSIZE)
        state.offset = torch.empty(())
    return state


def states_by_weight(keys: Iterable[str]) -> dict[str, list[str]]:
    """For each NF4 weight of a checkpoint, by its key, the keys of its quant state."""
    states: dict[str, list[str]] = {}
    for key in filter(is_nf4_key, keys):
        states.setdefault(f"{key.rpartition('.weight.')[0]}.weight", []).append(key)
    return states


def is_nf4_key(key: str) -> bool:
    """Whether a checkpoint key belongs to the quant state of an NF4 weight (and is not a weight itself)."""
    return key.rpartition(".weight.")[2] in (
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        _STATE_KEY,
    )
