"""`qdora init`: a commented config for this model, this data and this memory, to be read, changed and trained with.

Nothing is asked. What can be measured is measured (the rows' lengths, what fits); the rest are the defaults, each with
a line on when to change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qdora.architecture import context_of, is_nf4, load_config
from qdora.arguments import flags_of, parse_train
from qdora.data import EncodedData, encode
from qdora.distributed import bar
from qdora.errors import ConfigError
from qdora.output import replace_text
from qdora.plan import SWITCHES, Need
from qdora.planner import asked_plan, choose, memory_model, usable_bytes
from qdora.rows import Row, read_rows
from qdora.tokenizer import load_tokenizer, use_template

__all__ = ["InitReport", "init"]

_LOOKED_AT = 2000
_COVERED = 0.99
_FEW_ROWS = 500
# None of them can be spared to evaluate on.
_TOO_FEW_ROWS = 20


@dataclass(frozen=True)
class InitReport:
    """What `init` wrote."""

    path: Path
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path} holds a commented config for {self.settings['model_name_or_path']}; read it, change it"


@dataclass(frozen=True)
class _Lengths:
    """Of the rows, in tokens."""

    layout: str
    median: int
    covered: int
    """What nearly all rows are within."""
    longest: int
    looked_at: int
    rows: int


def init(
    model: str | Path,
    dataset: str | Path,
    *,
    memory: str | None = None,
    dataset_config: str | None = None,
    chat_template_path: str | Path | None = None,
    out: str | Path = "qdora.yaml",
    overwrite: bool = False,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
) -> InitReport:
    """Write a config for `qdora train`.

    Args:
        model: an NF4 checkpoint, a 16-bit model directory or a Hub id, of which no weights are fetched.
        dataset: as for `train`.
        memory: what the run must fit in, such as 8GB; without it the config leaves the plan as it stands.
        dataset_config: of a data set on the Hub.
        chat_template_path: a Jinja file, if the model's tokenizer has no chat template or another is meant.
        out: the file to write.
        use_cpu: reckon memory for the CPU instead of an accelerator.

    Raises:
        QDoRAError: no such model or data, nothing fits, or the file is there.
    """
    path = Path(out)
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; name the file to write with --out, such as {path / 'qdora.yaml'}")
    read = [Path(file).resolve() for file in (dataset, chat_template_path) if file is not None]
    if path.resolve() in read:
        raise ConfigError(f"{path} is what the run reads; name another file with --out")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; name another file with --out, or pass --overwrite")
    if not path.parent.is_dir():
        raise ConfigError(f"no directory {path.parent} to write {path.name} in; make it first")
    architecture = load_config(model, trust_remote_code)
    in_nf4 = is_nf4(architecture, model)
    rows = read_rows(dataset, config=dataset_config)
    tokenizer = load_tokenizer(model, trust_remote_code, fetch_weights=False)
    use_template(tokenizer, chat_template_path)
    lengths = _measure(rows, tokenizer, dataset)
    template = None if chat_template_path is None else str(chat_template_path)
    asked = {
        "dataset_config": dataset_config,
        "chat_template_path": template,
        "trust_remote_code": trust_remote_code or None,
    }
    settings = _settings(str(model), str(dataset), asked, lengths, context_of(architecture))
    fitted = None if memory is None else _fit(settings, memory, use_cpu)
    replace_text(path, _page(path, settings, lengths, in_nf4, memory, fitted))
    return InitReport(path, settings)


def _measure(rows: Sequence[Row], tokenizer: Any, dataset: str | Path) -> _Lengths:
    step = max(1, len(rows) // _LOOKED_AT)
    numbers = range(1, len(rows) + 1, step)
    data: EncodedData = encode(
        [rows[i - 1] for i in numbers], tokenizer, None, dataset, progress=bar("tokenize", "rows"), numbers=numbers
    )
    lengths = sorted(map(len, data.input_ids))
    covered = lengths[min(len(lengths) - 1, math.ceil(_COVERED * len(lengths)) - 1)]
    return _Lengths(data.layout, lengths[len(lengths) // 2], covered, lengths[-1], len(lengths), len(rows))


def _settings(
    model: str, dataset: str, asked: dict[str, Any], lengths: _Lengths, context: int | None
) -> dict[str, Any]:
    """What the data suggests, in the order of the page."""
    max_length = -(-lengths.covered // 64) * 64
    few = lengths.rows < _FEW_ROWS
    settings = {
        "model_name_or_path": model,
        "dataset": dataset,
        **{name: value for name, value in asked.items() if value is not None},
        "output_dir": f"{Path(dataset).stem}-adapter",
        "validation_split_percentage": 10 if few else 5,
        "max_length": min(max_length, context) if context else max_length,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
        "learning_rate": "2e-4",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1 if few else 4,
        "logging_steps": 10,
        "early_stopping_patience": 3,
        "seed": 42,
    }
    if lengths.rows < _TOO_FEW_ROWS:
        del settings["validation_split_percentage"], settings["early_stopping_patience"]
    return settings


def _fit(settings: dict[str, Any], memory: str, use_cpu: bool) -> Need:
    """Put the fastest plan that fits into the settings."""
    run, training = parse_train(flags_of({**settings, "use_cpu": use_cpu}))
    reckoned, asked = memory_model(run, training, not use_cpu), asked_plan(run, training, not use_cpu)
    plan, need = choose(reckoned, asked, usable_bytes(memory, not use_cpu), may_hold_outputs=True)
    settings["per_device_train_batch_size"] = plan.rows
    settings["gradient_accumulation_steps"] = plan.accumulation
    if plan.loss_chunk_bytes != asked.loss_chunk_bytes:
        settings["loss_chunk_size"] = plan.loss_chunk_size()
    settings |= {name: True for name in SWITCHES if getattr(plan, name)}
    return need


def _page(
    path: Path,
    settings: dict[str, Any],
    lengths: _Lengths,
    in_nf4: bool,
    memory: str | None,
    fitted: Need | None,
) -> str:
    model = settings["model_name_or_path"]
    seen = "" if lengths.looked_at == lengths.rows else f" (of {lengths.looked_at:,} looked at)"
    comments = {
        "model_name_or_path": []
        if in_nf4
        else [
            "16-bit: it is quantized to NF4 each time it loads.",
            f"`qdora quantize {model} BASE` does that once; then name BASE here.",
        ],
        "dataset": [f"{lengths.rows:,} rows in the {lengths.layout} layout."],
        "output_dir": ["The adapter, checkpoints, and a report to read."],
        "validation_split_percentage": [
            "Rows kept back; the loss on them chooses the best checkpoint.",
            "Of your own: eval_dataset: FILE instead.",
        ],
        "max_length": [
            f"Tokens a row: half have {lengths.median}, {_COVERED:.0%} at most {lengths.covered}, the longest "
            f"{lengths.longest}{seen}.",
            "Longer rows lose their end, and are counted.",
        ],
        "lora_r": ["The rank: more (32, 64) for much data or a new skill, less (8) for a matter of style."],
        "lora_alpha": ["The update is scaled by alpha / rank; twice the rank is a good start."],
        "learning_rate": [
            "The first thing to change: 1e-4 if the loss jumps, 5e-4 if it hardly falls.",
            "The magnitudes may have their own: magnitude_learning_rate.",
        ],
        "num_train_epochs": ["Passes over the data; max_steps: N sets the steps themselves."],
        "per_device_train_batch_size": _batch_comment(path, settings, memory, fitted),
        "early_stopping_patience": ["Stop after three evaluations without a better one."],
    }
    lines = [
        f"# Fine-tune {model} on {settings['dataset']}:",
        f"#   qdora train {path}",
        "# Flags override it (--max_steps 20); `qdora train --help_all` lists every setting there is.",
    ]
    for name, value in settings.items():
        found = comments.get(name, [])
        lines += ["", *(f"# {line}" for line in found)] if found else []
        entry = {name: _number(value) if name == "learning_rate" else value}
        lines.append(yaml.safe_dump(entry, allow_unicode=True, width=1000).strip())
    return "\n".join(lines) + "\n"


def _batch_comment(path: Path, settings: dict[str, Any], memory: str | None, fitted: Need | None) -> list[str]:
    step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    lines = [f"Rows at once, and how often before a step: {step} rows a step."]
    if fitted is None:
        return [*lines, f"What that needs of memory: `qdora estimate {path}`; `memory: 8GB` makes it fit."]
    lines.append(f"The fastest plan that fits in {memory}; its peak:")
    return lines + [f"  {line.rstrip()}" for line in str(fitted).splitlines()]


def _number(value: Any) -> Any:
    """2e-4 as people write it: YAML's own form of a small number is 0.0002, and it reads `2e-4` as text."""
    return float(value) if isinstance(value, str) and value.replace("e-", "").isdigit() else value
