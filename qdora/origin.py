"""What a norm's output was made of, for whoever would keep it for a backward.

The idea. For the gradient of A a linear keeps its input z, tokens × features. Mostly z is the output of the usual norm,
z = w ⊙ x / √(mean(x²) + ε), and that norm keeps x already, for its own backward, and 1/√(…), a number a token. So

    dA = dhᵀ·z = w ⊙ ((dh / √(…))ᵀ·x)

needs no z. While a decoder layer is in its backward, two tensors of tokens × hidden size are not there, and what it
costs is to scale tokens × rank and rank × features values.

How it is known. The norm leaves a note about the tensor that it returns, and a linear looks whether there is one about
the tensor that it gets. Whatever is done in between makes another tensor, or another version of it; what has no note is
kept as ever. (As with the row scale in `dora`, a write through `.data` in between escapes.) A note lives as long as its
tensor, and holds x as long: who keeps the last hidden states of a model keeps what its last norm was given, too.

The constraints. A checkpoint's forward and its recompute must decide alike, so nothing is asked that may differ between
them, such as whether somebody still holds x. If they differ all the same, because one of them is given another tensor,
the checkpoint says so: z and what is kept in its place differ in shape. And x must still be what it was when the
gradient is made. torch sees to that for what autograd keeps, but not through a checkpoint, so versions are compared.

The rejected alternatives: one module for norm and linears, which every model lays out in its own way; computing z
again, which costs time, and a buffer of its size; the note on z's node of autograd's graph, which a checkpoint keeps,
and so a number a token for each norm of every layer (for norms of heads, a number a head); an attribute of z, which
would be pickled with it.

Shape suffixes: T tokens, I features.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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


_notes: MutableMapping[Tensor, tuple[int, Origin]] = WeakTensorKeyDictionary()
"""By z: its version and its origin."""


def note_origin(z: Tensor, values: Tensor, row: Tensor, column: Tensor) -> None:
    """Note that z, (..., I), is made of these, if somebody may want to know.

    Not in fp16, in which a small gradient may vanish when it is scaled.
    """
    version = version_of(values)
    wanted = torch.is_grad_enabled() and z.dtype == values.dtype != torch.float16 and values.is_contiguous()
    if wanted and version is not None:
        # A copy of the column: FSDP2 takes a parameter's memory away where its own module does not need it.
        parts = values.detach().view(-1, values.shape[-1]), row, column.detach().clone()
        _notes[z] = z._version, Origin(*parts, version)


def origin_of(z: Tensor) -> Origin | None:
    """What was noted of it, if both still are what they were then."""
    version, origin = _notes.get(z, (0, None))
    unchanged = origin is not None and (version, origin.version) == (z._version, origin.values._version)
    return origin if unchanged else None


def version_of(values: Tensor) -> int | None:
    """How often they were changed in place; None under `torch.compile` and for inference tensors, where none counts."""
    return None if torch.compiler.is_compiling() or values.is_inference() else values._version


def check_unchanged(values: Tensor, version: int | None) -> None:
    """Of what a norm was given, at the time of its backward.

    The recompute makes it by the same operations, hence with the same version; a copy that waited on the host begins
    at 0. Where a hook brings it back in a buffer that it fills, there is nothing to be told by versions, and it is
    refused.

    Raises:
        ConfigError: it was changed in place.
    """
    if version is not None and values._version > version:
        raise ConfigError(
            "what a norm was given was changed in place before its gradient was made, by the model or by a hook on "
            "saved tensors; leave that out"
        )
