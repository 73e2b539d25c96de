"""`qdora estimate`: what a training run will need, from the model's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.arguments import flags_of, parse_estimate
from qdora.errors import ConfigError
from qdora.plan import Need, Plan
from qdora.planner import asked_plan, choose, memory_model, usable_bytes
from qdora.shards import format_bytes

__all__ = ["Estimate", "estimate", "estimate_from_arguments"]


@dataclass(frozen=True)
class Estimate:
    """What a run takes, and how it is run for that."""

    model: str
    length: int
    """Tokens of the longest row."""
    rank: int
    plan: Plan
    need: Need
    memory: str | None
    """What it was made to fit in."""
    usable_bytes: int | None
    """What of that may be allocated."""

    def __str__(self) -> str:
        rows = f"{self.plan.rows} × {self.length} tokens a micro-batch, rank {self.rank}"
        lines = [f"{self.model}, {rows}", str(self.need)]
        if self.usable_bytes is not None:
            lines.append(f"fits in {self.memory} ({format_bytes(self.usable_bytes)} of it to allocate):")
        return "\n".join([*lines, f"flags: {self.plan.flags()}"])


def estimate(model: str | Path, config: str | Path | None = None, **flags: Any) -> Estimate:
    """What training would need at its peak. Needs neither weights nor a GPU.

    Args:
        model: a directory with `config.json`, that file, or a Hub id, of which only the config is fetched.
        config: a YAML file of flags.
        flags: those of `qdora train`, by name (`max_length=2048`, `lora_r=16`); with `memory="8GB"` the fastest plan
            that fits is looked for. Reckoned for an accelerator, or with `use_cpu=True` for the CPU.

    Raises:
        QDoRAError: a flag is wrong, there is no such model, or nothing fits.
    """
    settings = flags_of({"model_name_or_path": str(model), **flags})
    return estimate_from_arguments([*([] if config is None else [str(config)]), *settings])


def estimate_from_arguments(arguments: Sequence[str]) -> Estimate:
    """`estimate`, given a command line: `MODEL` or `CONFIG.yaml`, then flags."""
    given = list(arguments)
    if given and not given[0].startswith("-") and Path(given[0]).suffix not in (".yaml", ".yml"):
        given[:1] = ["--model_name_or_path", given[0]]
    run, training = parse_estimate(given)
    if run.dry_run:
        raise ConfigError("--dry_run is for `qdora train`; an estimate never starts a run")
    on_accelerator = not training.use_cpu
    reckoned, plan = memory_model(run, training, on_accelerator), asked_plan(run, training, on_accelerator)
    usable = None if run.memory is None else usable_bytes(run.memory, on_accelerator)
    if usable is None:
        need = reckoned.need(plan)
    else:
        plan, need = choose(reckoned, plan, usable, run.hold_outputs is None)
    return Estimate(run.model_name_or_path, training.max_length, run.lora_r, plan, need, run.memory, usable)
