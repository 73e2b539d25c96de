"""What an adapter is: rank, alpha, targets. One frozen description, checked when it is made."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from qdora.errors import ConfigError, shown
from qdora.patterns import check_pattern, matches

__all__ = ["ALL_LINEAR", "OTHER_FORWARDS", "AdapterConfig", "ends_in", "is_named", "short_name"]

ALL_LINEAR = "all-linear"
# What PEFT's configs may ask of a LoRA linear that changes its forward in ways DoRALinear has not.
OTHER_FORWARDS = (
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)
# The path of the experts, and the name of a linear in one of them.
_ROUTED = re.compile(r"(.*\.experts|experts)\.\d+\.(.+)")
_Number = TypeVar("_Number", int, float)
_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class AdapterConfig:
    """The low-rank adapter to attach to a model's linears.

    Raises:
        ConfigError: a value is out of its range; the message quotes it.
    """

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """Strength of the direction update: scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank path, in training only. The base weight always sees the whole input."""
    use_dora: bool = True
    """Train a magnitude for each output (DoRA, arXiv 2402.09353). False gives plain LoRA."""
    use_rslora: bool = False
    """Rank-stabilized scaling (arXiv 2312.03732)."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """`"all-linear"` (every linear of the decoder but those of routed experts), names such as `("q_proj", "v_proj")`,
    matched against the last parts of a module's path as PEFT does, or one regular expression for the whole path. Routed
    experts have adapters only if a name says so: `"experts"` for all their linears, `"experts.down_proj"` for one."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for modules whose path ends in a match of the pattern."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas, likewise."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train whole beside the adapters, by the ends of their paths: `("embed_tokens", "lm_head")`."""
    ensure_weight_tying: bool = True
    """Whether an embedding and a head that are one weight stay one when either is trained whole."""
    dtype: str = "bfloat16"
    """What A, B and the magnitude offset are stored and trained in: `bfloat16` or `float32`."""

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.modules_to_save, str) or "" in self.modules_to_save:
            raise ConfigError(f"modules_to_save is a list of names, found {self.modules_to_save!r}")
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        if not self.target_modules or (isinstance(self.target_modules, tuple) and "" in self.target_modules):
            raise ConfigError(f"target_modules must name at least one module, found {shown(self.target_modules)}")
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank must be a whole number of at least 1, found {name}={shown(rank)}")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not (isinstance(alpha, int | float) and 0 < alpha <= sys.float_info.max):
                raise ConfigError(f"alpha must be a positive number, found {name}={shown(alpha)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), found {shown(self.dropout)}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"adapter dtype must be one of {', '.join(_DTYPES)}, found {shown(self.dtype)}")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            check_pattern(self.target_modules)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check_pattern(pattern)
            check_pattern(_at_the_end(pattern))

    def targets(self, module: str) -> bool:
        """Whether the linear at this dotted path gets an adapter."""
        if self.target_modules == ALL_LINEAR:
            return _ROUTED.fullmatch(module) is None
        if isinstance(self.target_modules, str):
            return matches(self.target_modules, module)
        return any(is_named(module, name) for name in self.target_modules)

    def rank_of(self, module: str) -> int:
        """The rank of the adapter at this path."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of the adapter at this path."""
        return _first_match(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """The factor on B·A at this path."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def ends_in(path: str, name: str) -> bool:
    """Whether a dotted path is this name or ends in it, in whole parts."""
    return path == name or path.endswith(f".{name}")


def is_named(module: str, name: str) -> bool:
    """Whether a name of `target_modules` means the linear at this path."""
    routed = _ROUTED.fullmatch(module)
    if routed is None or module == name:
        return ends_in(module, name)
    experts, linear = routed.groups()
    # The number in between is nobody's to write; and "up_proj" means the plain ones.
    means = "experts" in name.split(".")
    return means and any(ends_in(path, name) for path in (experts, f"{experts}.{linear}"))


def short_name(module: str) -> str:
    """The shortest name of `target_modules` that means linears such as the one at this path."""
    name = module.rpartition(".")[2]
    return name if _ROUTED.fullmatch(module) is None else f"experts.{name}"


def _first_match(pattern_values: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    # PEFT's rule: the pattern must match the end of the path, at a dot or at its start.
    for pattern, value in pattern_values.items():
        if matches(_at_the_end(pattern), module):
            return value
    return default


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"
