"""Modules that are trained whole beside the adapters: embedding, head, a norm (PEFT's `modules_to_save`).

A copy is trained and the original stays, so that the base is still there when adapters are disabled, and the adapter's
file holds the copy. An embedding and a head that are one weight stay one, unless the adapter says otherwise
(`ensure_weight_tying`, PEFT's name; PEFT's own default is to part them).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qdora.config import ends_in
from qdora.errors import ConfigError
from qdora.nearest import did_you_mean

__all__ = ["TrainedWhole", "names_for_peft", "train_whole", "trained_whole"]


class TrainedWhole(nn.Module):
    """A module's trained copy, in its place; the frozen original answers while adapters are disabled."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.trained = copy.deepcopy(original).requires_grad_(True)
        self.enabled = True

    @property
    def now(self) -> Any:
        """The one of the two that answers."""
        return self.trained if self.enabled else self.original

    @property
    def weight(self) -> Tensor:
        """Of the one that answers: losses multiply with a head's weight themselves."""
        weight: Tensor = self.now.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Of the one that answers, if it has one."""
        return getattr(self.now, "bias", None)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's own."""
        return self.now(*inputs, **named)


def trained_whole(model: nn.Module) -> dict[str, TrainedWhole]:
    """Every such module of the model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedWhole)}


def names_for_peft(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that mean these modules to PEFT too, to which `norm` is the end of `input_layernorm`; else paths."""
    whole = trained_whole(model)
    inner = tuple(f"{path}." for path in whole)
    meant = [path for path, _ in model.named_modules() if path.endswith(names) and not path.startswith(inner)]
    return names if set(meant) <= whole.keys() else tuple(whole)


def _matching(model: nn.Module, names: Iterable[str], tie: bool) -> list[str]:
    """The paths of the modules that these names mean, and with `tie` of those that share their weight.

    Raises:
        ConfigError: a name means nothing, or what cannot be trained whole.
    """
    names = list(names)
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if not any(ends_in(path, name) for path in paths):
            known = sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()})
            raise ConfigError(f"modules_to_save names {name!r}, which is no module here{did_you_mean(name, known)}")
    found = [path for path in paths if any(ends_in(path, name) for name in names)]
    for path in found:
        _check_plain(path, model.get_submodule(path))
    pair = _tied_pair(model)
    return sorted({*found, *pair}) if tie and set(found) & set(pair) else found


def train_whole(model: nn.Module, names: Iterable[str], tie: bool) -> None:
    """Put a trained copy in the place of each of these modules. Raises as `_matching`."""
    if not names:
        return
    paths, pair = _matching(model, names, tie), _tied_pair(model)
    for path in paths:
        model.set_submodule(path, TrainedWhole(model.get_submodule(path)).train(model.training))
    if tie and pair and set(pair) <= set(paths):
        embedding, head = (model.get_submodule(f"{path}.trained") for path in pair)
        head.weight = embedding.weight


def _check_plain(path: str, module: nn.Module) -> None:
    if next(module.children(), None) is not None or not isinstance(getattr(module, "weight", None), Tensor):
        raise ConfigError(
            f"modules_to_save names {path!r}, a {type(module).__name__}; only embedding, head and norms on the device "
            "can be trained whole"
        )


def _tied_pair(model: Any) -> tuple[str, str] | tuple[()]:
    """The paths of input embedding and head, if they are one weight."""
    ends: list[Any] = [
        getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")
    ]
    if None in ends or ends[0].weight is not ends[1].weight:
        return ()
    embedding, head = (next(path for path, module in model.named_modules() if module is end) for end in ends)
    return embedding, head
