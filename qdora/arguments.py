"""`qdora train`'s flags: ours for model, data and adapter, and all of TRL's `SFTConfig` for the training itself.

A config file and the command line are one thing: the file's entries become flags that stand before those of the
command line, so that both are parsed, typed and checked by the same parser, and the later ones win.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from qdora.config import ALL_LINEAR, AdapterConfig
from qdora.errors import ConfigError
from qdora.shards import parse_size

__all__ = ["OWN_OPTIMIZERS", "RunArguments", "adapter_config", "flags_of", "parse_estimate", "parse_train"]

# Where our defaults differ from SFTConfig's: an adapter learns faster than a whole model, bf16 is the model's own
# dtype (so that autocast has nothing to do), and a loss that is not finite must be seen.
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
}


# What other tools call it.
_OTHER_NAMES = {
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "data": "dataset",
    "dataset_name": "dataset",
    "train_file": "dataset",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
    "resume": "resume_from_checkpoint",
}


# The names under which AdamW means `optimizer.CompensatedAdamW`; any other name is the trainer's.
OWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_NOT_STARTED = ("--dataset", "none", "--output_dir", "none")


@dataclass
class RunArguments:
    """What to train on what; the names are those of TRL's command line."""

    model_name_or_path: str = field(metadata={"help": "an NF4 checkpoint, a 16-bit model directory or a Hub id"})
    dataset: str = field(metadata={"help": "a .jsonl, .json, .csv or .parquet file, or a data set on the Hub"})
    dataset_split: str = field(default="train", metadata={"help": "which split of a Hub data set"})
    eval_dataset: str | None = field(default=None, metadata={"help": "likewise, to evaluate on"})
    eval_dataset_split: str = field(default="test", metadata={"help": "which split of a Hub data set to evaluate on"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the arithmetic: bfloat16, float16 or float32"})
    load_in_4bit: bool = field(default=True, metadata={"help": "quantize a 16-bit model to NF4 as it loads"})
    use_dora: bool = field(default=True, metadata={"help": "train a magnitude for each output; false gives LoRA"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha/sqrt(rank) instead of alpha/rank"})
    lora_r: int = field(default=16, metadata={"help": "rank of the direction update"})
    lora_alpha: float = field(default=32.0, metadata={"help": "its strength: the update is scaled by alpha/rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the low-rank path"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": "names of linears, one regular expression, or all-linear"},
    )
    adapter_dtype: str = field(default="bfloat16", metadata={"help": "of what trains: bfloat16 or float32"})
    stream_base: bool = field(
        default=False, metadata={"help": "leave base weights on the host, two layers at a time on the device"}
    )
    embedding_on_host: bool = field(default=False, metadata={"help": "leave the input embedding on the host"})
    loss_chunk_size: str = field(default="64MiB", metadata={"help": "of the fp32 logits that exist at once"})
    memory: str | None = field(default=None, metadata={"help": "make the run fit in this, such as 8GB"})
    dry_run: bool = field(default=False, metadata={"help": "print what the run needs, and stop"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "write over an adapter that is there"})


def parse_train(arguments: Sequence[str]) -> tuple[RunArguments, Any]:
    """Parse `[CONFIG.yaml] [--flag value …]`.

    Returns:
        Our arguments and TRL's `SFTConfig`.

    Raises:
        ConfigError: an unknown name (the nearest one is suggested), a bad value, a missing one.
    """
    from trl import SFTConfig

    parser = _Parser((RunArguments, SFTConfig), add_help=False, allow_abbrev=False, prog="qdora train")
    parser.set_defaults(**_DEFAULTS)
    flags = list(arguments)
    if flags and not flags[0].startswith("-"):
        flags = flags_of(_read_yaml(flags[0])) + flags[1:]
    known = {name.lstrip("-") for action in parser._actions for name in action.option_strings}
    for flag in flags:
        name = flag[2:].partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in known:
            raise ConfigError(f"unknown flag --{name}{_suggestion(name, known)}")
    flags = _with_bare_fsdp([_spelled(flag) for flag in flags])
    missing = [name for name in ("model_name_or_path", "dataset", "output_dir") if not _is_given(name, flags)]
    if missing:
        raise ConfigError(f"missing: {', '.join('--' + name for name in missing)} (as flags or in the config file)")
    try:
        with warnings.catch_warnings():
            # TRL's own default sets a flag by the name that transformers is about to change.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
            run, training = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"these training flags do not fit together: {str(error).splitlines()[0]}") from None
    _check_together(run, training)
    return run, training


def _check_together(run: RunArguments, training: Any) -> None:
    if training.eval_strategy != "no" and not run.eval_dataset:
        raise ConfigError(f"--eval_strategy {training.eval_strategy.value} needs an --eval_dataset")
    parse_size(run.loss_chunk_size)
    if training.activation_offloading and not training.gradient_checkpointing:
        raise ConfigError(
            "--activation_offloading keeps the inputs of recomputed layers; it needs gradient_checkpointing"
        )
    if training.truncation_mode != "keep_start":
        raise ConfigError(
            f"--truncation_mode {training.truncation_mode}: long rows lose their end, only keep_start fits"
        )
    for name in ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size"):
        value = getattr(training, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, found {value}")


def parse_estimate(arguments: Sequence[str]) -> tuple[RunArguments, Any]:
    """Parse `[CONFIG.yaml] [--flag value …]` of a run that will not be started: it needs no data and no output.

    Returns, Raises: as `parse_train`.
    """
    flags = list(arguments)
    start = 1 if flags and not flags[0].startswith("-") else 0
    return parse_train([*flags[:start], *_NOT_STARTED, *flags[start:]])


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """A mapping as command-line flags: lists as several values, mappings as JSON, None left out.

    Raises:
        ConfigError: a name that is no text.
    """
    flags = []
    for name, value in settings.items():
        if not isinstance(name, str):
            raise ConfigError(f"a setting's name must be text, found {name!r}")
        if value is None:
            continue
        flags.append(f"--{name}")
        if value is False and name.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if isinstance(value, list | tuple):
            flags += [_plain(item) for item in value]
        else:
            flags.append(json.dumps(value) if isinstance(value, Mapping) else _plain(value))
    return flags


def adapter_config(run: RunArguments) -> AdapterConfig:
    """The adapter that the flags describe."""
    targets = run.lora_target_modules
    # One that is not a plain or dotted name is a regular expression, as in PEFT.
    single = len(targets) == 1 and (targets[0] == ALL_LINEAR or not re.fullmatch(r"[\w.]+", targets[0]))
    return AdapterConfig(
        rank=run.lora_r,
        alpha=run.lora_alpha,
        dropout=run.lora_dropout,
        use_dora=run.use_dora,
        use_rslora=run.use_rslora,
        target_modules=targets[0] if single else tuple(targets),
        dtype=run.adapter_dtype,
    )


class _Parser(HfArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def common_flags() -> str:
    """Our own flags and the training flags most used, for `qdora train --help`."""
    lines = []
    for item in dataclasses.fields(RunArguments):
        default = "" if item.default is dataclasses.MISSING else f" [{item.default}]"
        lines.append(f"  --{item.name:<28} {item.metadata['help']}{default}")
    return "\n".join(lines)


def _read_yaml(name: str) -> Mapping[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; write its settings there, or give flags alone")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path} must hold settings such as `learning_rate: 2e-4`, one a line")
    return settings


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _spelled(flag: str) -> str:
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _with_bare_fsdp(flags: Sequence[str]) -> list[str]:
    """`--fsdp true`, as a file says it, as the bare `--fsdp` that transformers understands; and none for false."""
    plain: list[str] = []
    for flag in flags:
        value = flag.partition("=")[2].lower() if flag.startswith("--fsdp=") else flag.lower()
        asked = flag.startswith("--fsdp=") or plain[-1:] == ["--fsdp"]
        if asked and value in ("true", "false"):
            plain = [*(plain[:-1] if plain[-1:] == ["--fsdp"] else plain), *(["--fsdp"] if value == "true" else [])]
        else:
            plain.append(flag)
    return plain


def _is_given(name: str, flags: Sequence[str]) -> bool:
    return any(flag == f"--{name}" or flag.startswith(f"--{name}=") for flag in flags)


def _suggestion(name: str, known: set[str]) -> str:
    def likeness(candidate: str) -> float:
        # The beginning counts too: `modle` is near `model_name_or_path`.
        heads = (candidate, candidate[: len(name)])
        whole, head = (difflib.SequenceMatcher(None, name, text).ratio() for text in heads)
        return max(whole, 0.9 * head)

    ours = [item.name for item in dataclasses.fields(RunArguments)]
    near = _OTHER_NAMES.get(name) or max([*ours, *sorted(k.replace("-", "_") for k in known)], key=likeness)
    if likeness(near) < 0.6 and name not in _OTHER_NAMES:
        return "; `qdora train --help` lists the common ones"
    return f"; did you mean --{near}?"
