"""Which linears hold their outputs with `--hold_outputs`: those in which a layer's recompute ends.

Under gradient checkpointing a decoder layer is computed again until all is there that its backward waits for. Where the
last of that is the output of an adapted linear, which only the gradient of its magnitude wants, holding that output
since the forward spares the product (see `product`). Which linear that is, the model's own code decides: in Llama the
last; in Gemma none, for a norm follows, which waits for more. So a step is run over fake tensors (see `simulate`) and
looked at: the recompute ends in a linear that it enters and does not leave.

Then the step is run again with those outputs held, for a model may change them in place, which spoils what is held
(Falcon adds the residual so).

The rejected alternative: that each linear notice in the first real step. Then a forward and its recompute may decide
differently, and what the one keeps is not what the other makes.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

from torch import nn

from qdora.dora import DoRALinear
from qdora.errors import ConfigError, reason
from qdora.inject import decoder_layers, hold_outputs
from qdora.simulate import Batch, cut, rehearse_step

__all__ = ["linears_to_hold"]

_BATCH = Batch(rows=1, length=8, padded=False)


def linears_to_hold(model: nn.Module) -> tuple[str, ...]:
    """The paths, within a decoder layer, of the linears whose outputs are worth holding; often one, or none.

    Args:
        model: on the meta device, with adapters.

    Raises:
        ConfigError: the model's step does not run over fake tensors.
    """
    small = deepcopy(model)
    cut(small)
    hold_outputs(small, ())
    inside = _watched(small)
    try:
        rehearse_step(small, _BATCH)
    except Exception as error:
        # a model's own code may fail in any way
        raise ConfigError(
            f"cannot tell which outputs of {type(model).__name__} to hold, its step does not run without values: "
            f"{reason(error)}; leave --hold_outputs out"
        ) from None
    names = tuple(sorted({name for name, times in inside.items() if times}))
    if not names:
        return ()
    hold_outputs(small, names)
    try:
        rehearse_step(small, _BATCH)
    except ConfigError:
        return ()
    return names


def _watched(model: nn.Module) -> Counter[str]:
    """How often each linear with a magnitude that trains was entered and not left, by its path within its layer."""
    inside: Counter[str] = Counter()
    for layer in decoder_layers(model):
        for name, linear in layer.named_modules():
            if isinstance(linear, DoRALinear) and _trains_magnitude(linear):

                def enter(*_: Any, name: str = name) -> None:
                    inside[name] += 1

                def leave(*_: Any, name: str = name) -> None:
                    inside[name] -= 1

                linear.register_forward_pre_hook(enter)
                linear.register_forward_hook(leave)
    return inside


def _trains_magnitude(linear: DoRALinear) -> bool:
    return linear.magnitude_offset is not None and linear.magnitude_offset.requires_grad
