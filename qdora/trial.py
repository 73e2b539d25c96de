"""Whether a stranger's module computes what one of ours does, found out by trying."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["same_bits", "takes_one_input", "with_parts"]


def takes_one_input(module: nn.Module) -> bool:
    """Whether its forward has one parameter."""
    return len(inspect.signature(module.forward).parameters) == 1


def with_parts(module: nn.Module, parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]) -> Any:
    """A shallow copy with other parts in the places of its own, in train mode: it must drop nothing at random."""
    trial: Any = copy.copy(module)
    trial._parameters = {**module._parameters, **parameters}
    trial._modules = {**module._modules, **modules}
    trial.training = True
    return trial


def same_bits(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], *inputs: Tensor) -> bool:
    """Whether two functions answer alike to each of these; an error is another answer. No random state moves."""
    with torch.random.fork_rng(devices=[]):
        try:
            return all(torch.equal(one(x), other(x)) for x in inputs)
        except Exception:
            # a model's own code may mind anything about an input that is not from it
            return False
