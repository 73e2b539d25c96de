"""What a tensor was made of, for who would keep it: two numbers a row and a column instead of a matrix.

The idea. For the gradient of A a linear keeps its input z, tokens × features. Mostly z is the output of the usual norm,
z = w ⊙ x / √(mean(x²) + ε), and that norm keeps x already, for its own backward, and 1/√(…), a number a token. So

    dA = dhᵀ·z = w ⊙ ((dh / √(…))ᵀ·x)

needs no z: two tensors of tokens × hidden size are spared of a decoder layer while it is in its backward, at the price
of scaling tokens × rank and rank × features values. And it is nearer to the truth: z was rounded twice, x was not.

How it is known. The norm leaves a note on its node of autograd's graph, and a linear reads it there, if that node made
the tensor that it gets. Whatever is done in between has a node of its own, or changes the tensor's version; what has no
note is kept as ever. The note holds nothing large: a node lives as long as the graph, and a checkpoint keeps a node a
layer whose x it means to forget.

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

__all__ = ["Origin", "check_unchanged", "note_origin", "origin_of", "version_of"]


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
    """What is left on the node that made z."""

    z_version: int
    values: ref[Tensor]
    row: Tensor
    column: Tensor
    version: int


def note_origin(ctx: Any, z: Tensor, values: Tensor, row: Tensor, column: Tensor) -> None:
    """Leave a note on z's node: called in the forward of the function that makes it, (..., I), out of these.

    Not in fp16, in which a small gradient may vanish when it is scaled.
    """
    version = version_of(values)
    if version is not None and z.dtype == values.dtype != torch.float16 and values.is_contiguous():
        ctx.qdora_note = _Note(z._version, ref(values), row, column.detach(), version)


def origin_of(z: Tensor) -> Origin | None:
    """What was noted of it, if it still is what it was then, and its origin is still there."""
    note: _Note | None = getattr(z.grad_fn, "qdora_note", None)
    values = None if note is None or note.z_version != z._version else note.values()
    if note is None or values is None:
        return None
    return Origin(values.detach().view(-1, values.shape[-1]), note.row, note.column, note.version)


def version_of(values: Tensor) -> int | None:
    """How often they were changed in place; None where torch does not count, nor make gradients that could be wrong."""
    return None if torch.compiler.is_compiling() or values.is_inference() else values._version


def check_unchanged(values: Tensor, version: int | None) -> None:
    """
    Raises:
        ConfigError: the input of a norm is not what it was. (The recompute makes it by the same operations, hence with
            the same version; a copy, such as one that waited on the host, begins at 0.)
    """
    if version is not None and values._version > version:
        raise ConfigError(
            "the model changes the input of a norm in place, so that what was normed has no gradient; "
            "such a model cannot be trained here"
        )
