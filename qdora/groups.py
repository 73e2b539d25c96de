"""What the optimizer sees of an adapter: magnitude and direction, each with its learning rate and weight decay.

Magnitude and direction are what DoRA takes a weight apart into, and they need not learn alike. Weight decay pulls the
magnitude towards the base weight's, for what is stored is the offset from that; it pulls B towards zero, which is the
base's direction. Norms and biases that are trained whole have no decay, as in transformers: gains of 1 would go to 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qdora.errors import ConfigError

__all__ = [
    "MAGNITUDE",
    "Rates",
    "freeze_part",
    "keep_settings",
    "parameter_groups",
    "rates_by_part",
]

MAGNITUDE, _DIRECTION, _WHOLE = "magnitude", "direction", "modules to save"
_VECTORS = "modules to save, without decay"
_ONLY_B = "direction, B"
# Of an optimizer's settings; its rates are the schedule's, and go on.
_ASKED_ANEW = ("weight_decay", "betas", "eps")
_PART_OF = {"magnitude_offset": MAGNITUDE, "lora_A": _DIRECTION, "lora_B": _DIRECTION}


@dataclass(frozen=True)
class Rates:
    """How fast each part learns. None means: like the direction."""

    learning_rate: float
    """Of A, and of B unless `b_ratio` says otherwise."""
    weight_decay: float = 0.0
    magnitude_learning_rate: float | None = None
    magnitude_weight_decay: float | None = None
    b_ratio: float = 1.0
    """Learning rate of B by that of A: LoRA+ (arXiv 2402.12354, section 4)."""

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a negative number, or no ratio.
        """
        for name, value in vars(self).items():
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be at least 0, found {value!r}")
        if self.b_ratio == 0:
            raise ConfigError("loraplus_lr_ratio must be above 0; --freeze direction keeps A and B as they are")

    @property
    def differ(self) -> bool:
        """Whether any part is treated otherwise than the rest."""
        return (self.magnitude_learning_rate, self.magnitude_weight_decay, self.b_ratio) != (None, None, 1)

    def of(self, name: str) -> tuple[str, float, float]:
        """(group, learning rate, weight decay) of the parameter of that name."""
        last = name.rpartition(".")[2]
        if _PART_OF.get(last) == MAGNITUDE:
            rate = self.learning_rate if self.magnitude_learning_rate is None else self.magnitude_learning_rate
            decay = self.weight_decay if self.magnitude_weight_decay is None else self.magnitude_weight_decay
            return MAGNITUDE, rate, decay
        if last == "lora_B" and self.b_ratio != 1:
            return _ONLY_B, self.learning_rate * self.b_ratio, self.weight_decay
        return _PART_OF.get(last, _WHOLE), self.learning_rate, self.weight_decay


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """The trained parameters in groups as `torch.optim` takes them, each with its `name`."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group, rate, decay = rates.of(name)
            if group == _WHOLE and parameter.dim() < 2:
                group, decay = _VECTORS, 0.0
            entry = groups.setdefault(group, {"params": [], "lr": rate, "weight_decay": decay, "name": group})
            entry["params"].append(parameter)
    return list(groups.values())


def keep_settings(loaded: Iterable[dict[str, Any]], fresh: Iterable[Mapping[str, Any]]) -> None:
    """Decay, betas and epsilon as they are asked for now, in groups whose state was loaded.

    Args:
        loaded: an optimizer's groups.
        fresh: the same, as they were before.

    Raises:
        ValueError: another optimizer's groups were loaded, which lack settings that this one reads.
    """
    for group, before in zip(loaded, fresh, strict=True):
        if lacking := sorted(before.keys() - group.keys()):
            raise ValueError(f"its optimizer has no {', '.join(lacking)}")
        group.update({name: before[name] for name in _ASKED_ANEW if name in before})


def rates_by_part(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate that each part has now, under the names of a log: `learning_rate_magnitude`, `_A` and `_B`.

    Args:
        groups: an optimizer's; of those that are not named here, nothing is said.
    """
    now = {group["name"]: float(group["lr"]) for group in groups if "name" in group}
    parts = {"magnitude": now.get(MAGNITUDE), "A": now.get(_DIRECTION), "B": now.get(_ONLY_B, now.get(_DIRECTION))}
    return {f"learning_rate_{part}": rate for part, rate in parts.items() if rate is not None}


def freeze_part(model: nn.Module, part: str) -> None:
    """Keep one part of every adapter as it is: `magnitude`, `direction`, or `none` of them.

    Raises:
        ConfigError: another name, or nothing would be left to train.
    """
    if part == "none":
        return
    if part not in (MAGNITUDE, _DIRECTION):
        raise ConfigError(f"freeze must be {MAGNITUDE}, {_DIRECTION} or none, found {part!r}")
    parts = [(_PART_OF.get(name.rpartition(".")[2]), p) for name, p in model.named_parameters() if p.requires_grad]
    if not any(found != part for found, _ in parts):
        raise ConfigError(f"nothing is left to train: the adapters are all {part}; LoRA has no magnitude")
    _freeze(p for found, p in parts if found == part)


def _freeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
