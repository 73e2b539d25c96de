"""The model before training, for trainers that compare with it (DPO's reference, GRPO's KL): the same weights again.

The base does not change, so the reference is the adapted model with its adapters disabled. TRL knows that of a
`PeftModel` only; given any other model it loads another one from `model.config._name_or_path`, in 16 bits if that is
what lies there: memory for a second model, and not quite the function that is trained. This module is what to give it
instead. It holds the model that is trained, and no weights of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from qdora.errors import ConfigError
from qdora.inject import adapted_linears, adapters_disabled
from qdora.whole import TrainedWhole

__all__ = ["ReferenceModel", "reference_model"]


def reference_model(model: nn.Module) -> ReferenceModel:
    """What `model` is without its adapters, sharing every weight, as trainers take a `ref_model`.

    Raises:
        ConfigError: the model has no adapters; it would be its own reference.
    """
    if not adapted_linears(model):
        raise ConfigError("a model without adapters is its own reference; load it with load_model(path, adapter=...)")
    return ReferenceModel(model)


class ReferenceModel(nn.Module):
    """Runs a model as its base does: adapters disabled, in eval mode, without gradients.

    Takes and returns what the model does. `train()` and `eval()` leave the model as it is; within a call it is in eval
    mode, whatever it was.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy: Any = policy
        self._backbone = _Backbone(policy)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's own, as the base."""
        with _as_base(self.policy):
            return self.policy(*inputs, **named)

    def train(self, mode: bool = True) -> Self:
        """Leaves the model that is trained in the mode it is in."""
        return self

    @property
    def base_model(self) -> nn.Module:
        """Without the head, as the base. TRL's fused losses call it, and multiply with the head themselves."""
        return self._backbone

    @property
    def config(self) -> Any:
        """The model's."""
        return self.policy.config

    def get_output_embeddings(self) -> Any:
        """The model's head as the base has it, also where a copy of it is trained whole."""
        head = self.policy.get_output_embeddings()
        return head.original if isinstance(head, TrainedWhole) else head


class _Backbone(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._held: tuple[Any] = (policy,)  # in a tuple, for the weights are the reference's already

    def forward(self, *inputs: Any, **named: Any) -> Any:
        (policy,) = self._held
        with _as_base(policy):
            return policy.base_model(*inputs, **named)


@contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    """Adapters off, eval mode, no gradients; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), adapters_disabled(model):
            yield
    finally:
        for module in training:
            module.training = True
