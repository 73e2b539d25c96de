"""NF4 by its definition (QLoRA, arXiv 2305.14314, appendix E), in fp64."""

import torch
from torch import Tensor

# Appendix E lists the 16 values.
CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float64,
)


def unpack(packed: Tensor, size: int) -> Tensor:
    """The code of each weight: the high half of a byte first."""
    flat = packed.reshape(-1).long()
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:size]


def dequantize(packed: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int = 64) -> Tensor:
    """code[q] · absmax of its block, fp64."""
    size = shape[0] * shape[1]
    block = torch.arange(size) // blocksize
    return (CODE[unpack(packed, size)] * absmax.double()[block]).reshape(shape)


def nested_absmax(q: Tensor, code: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The absmax under double quantization, fp64."""
    group = torch.arange(q.numel()) // 256
    return code.double()[q.long()] * nested.double()[group] + offset.double()
