"""What a tensor was made of, for who would keep it: two numbers a row and a column instead of a matrix.

The idea. For the gradient of A a linear keeps its input z, tokens × features. Mostly z is the output of the usual norm,
z = w ⊙ x / √(mean(x²) + ε), and that norm keeps x already, for its own backward, and 1/√(…), a number a token. So

    dA = dhᵀ·z = w ⊙ ((dh / √(…))ᵀ·x)

needs no z: two tensors of tokens × hidden size are spared of a decoder layer while it is in its backward, at the price
of scaling tokens × rank and rank × features values. And it is nearer to the truth: z was rounded twice, x was not.

How it is known. The norm leaves a note on the tensor that it returns, and the linear reads it off the tensor it gets.
Whatever is done in between makes another tensor, without a note, or one of another version; it is then kept as ever.

The constraint. x must still be what it was when the gradient is made. torch sees to that for what is kept, but not
through a checkpoint, so versions are compared here.

The rejected alternatives: one module for norm and linears, which every model lays out in its own way; computing z
again, which costs time, and a buffer of its size.

Shape suffixes: T tokens, I features.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from qdora.errors import ConfigError

__all__ = ["Origin", "check_unchanged", "note_origin", "origin_of"]


class Origin(NamedTuple):
    """z = column ⊙ values ⊙ row, but for rounding."""

    values: Tensor
    """(T, I), in z's dtype."""
    row: Tensor
    """(T, 1) fp32."""
    column: Tensor
    """(I,)."""
    version: int
    """Of the values."""


class _Note(NamedTuple):
    """What is left on z. Who holds z for longer must not hold x with it, so that is for others to keep."""

    z_version: int
    values: ref[Tensor]
    row: Tensor
    column: Tensor
    version: int


def note_origin(z: Tensor, values: Tensor, row: Tensor, column: Tensor) -> None:
    """Leave a note on z, (..., I), if somebody may want it.

    Not in fp16, in which a small gradient may vanish when it is scaled.
    """
    wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if wanted and z.dtype == values.dtype != torch.float16 and values.is_contiguous():
        noted: Any = z
        noted.qdora_note = _Note(z._version, ref(values), row, column.detach(), values._version)


def origin_of(z: Tensor) -> Origin | None:
    """What was noted of it, if it still is what it was then, and its origin is still there."""
    note: _Note | None = getattr(z, "qdora_note", None)
    values = None if note is None or note.z_version != z._version else note.values()
    if note is None or values is None:
        return None
    return Origin(values.detach().view(-1, values.shape[-1]), note.row, note.column, note.version)


def check_unchanged(values: Tensor, version: int) -> None:
    """
    Raises:
        ConfigError: the input of a norm is not what it was. (The recompute makes it by the same operations, hence with
            the same version; a copy, such as one that waited on the host, begins at 0.)
    """
    if values._version > version:
        raise ConfigError(
            "the model changes the input of a norm in place, so that what was normed has no gradient; "
            "such a model cannot be trained here"
        )
