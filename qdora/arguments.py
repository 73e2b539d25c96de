"""`qdora train`'s flags: ours for model, data and adapter, and all of TRL's `SFTConfig` for the training itself.

A config file and the command line are one thing: the file's entries become flags that stand before those of the
command line, so that both are parsed, typed and checked by the same parser, and the later ones win.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os.path import expanduser
from typing import Any

import torch
from transformers import HfArgumentParser

from qdora.config import ALL_LINEAR, AdapterConfig
from qdora.configfile import read_config
from qdora.errors import ConfigError
from qdora.flags import DEFAULTS, OTHER_NAMES, RunArguments
from qdora.groups import Rates
from qdora.nearest import did_you_mean, nearest, spelled
from qdora.together import check_evaluation, check_together

__all__ = ["adapter_config", "all_flags", "flag_parser", "flags_of", "parse_estimate", "parse_train", "rates"]

# Flags of ours that may name a path.
_PLACES = ("model_name_or_path", "dataset", "eval_dataset", "original_model_name_or_path")
_NOT_STARTED = ("--dataset", "none", "--output_dir", "none")


def parse_train(arguments: Sequence[str]) -> tuple[RunArguments, Any]:
    """Parse `[CONFIG.yaml] [--flag value …]`.

    Returns:
        Our arguments and TRL's `SFTConfig`.

    Raises:
        ConfigError: an unknown name (the nearest one is suggested), a bad value, a missing one; or nothing here can do
            what is asked.
    """
    run, training = _parse(arguments)
    if training.fp16 and (training.use_cpu or not torch.accelerator.is_available()):
        raise ConfigError("--fp16 needs an accelerator, and this run is on the CPU; leave it out")
    return run, training


def _parse(arguments: Sequence[str]) -> tuple[RunArguments, Any]:
    parser = flag_parser("train")
    flags = list(arguments)
    _check_config_is_first(flags, parser)
    if flags and not flags[0].startswith("-"):
        flags = flags_of(read_config(flags[0])) + flags[1:]
    known = {name.lstrip("-") for action in parser._actions for name in action.option_strings}
    for flag in flags:
        name = flag[2:].partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in known:
            raise ConfigError(f"unknown flag --{name}{_suggestion(name, known)}")
    flags = _with_plain_bf16(_with_bare_fsdp([spelled(flag) for flag in flags]))
    parser.set_defaults(**_evaluation_defaults(flags, parser.get_default("logging_steps")))
    if _is_on("fp16", flags):
        parser.set_defaults(adapter_dtype="float32")  # see `check_together`
    missing = [name for name in ("model_name_or_path", "dataset", "output_dir") if not _is_given(name, flags)]
    if missing:
        raise ConfigError(f"missing: {', '.join('--' + name for name in missing)} (as flags or in the config file)")
    try:
        with warnings.catch_warnings():
            # TRL's own default sets a flag by the name that transformers is about to change.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
            run, training, *_, left = parser.parse_args_into_dataclasses(
                flags, look_for_args_file=False, return_remaining_strings=True
            )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"these training flags do not fit together: {str(error).splitlines()[0]}") from None
    if left:
        raise ConfigError(_too_many(left[0], flags))
    _expand_home(run, training)
    if not _is_given("per_device_eval_batch_size", flags):
        # Rows without gradients take less than as many that train: what fits a step fits an evaluation.
        training.per_device_eval_batch_size = min(
            training.per_device_eval_batch_size, training.per_device_train_batch_size
        )
    if "perplexity" in str(training.metric_for_best_model) and not _is_given("greater_is_better", flags):
        training.greater_is_better = False
    rates(run, training)
    check_together(run, training)
    check_evaluation(run, training)
    return run, training


def _check_config_is_first(words: Sequence[str], parser: HfArgumentParser) -> None:
    """
    Raises:
        ConfigError: a config file stands behind another word, where no flag takes it.
    """
    may_be_bare = {name for action in parser._actions if action.nargs == "?" for name in action.option_strings}
    for before, word in pairwise(words):
        if word.startswith("-") or not word.endswith((".yaml", ".yml")):
            continue
        if not words[0].startswith("-") and before == words[0]:
            raise ConfigError(f"two config files, {words[0]} and {word}; put the settings of a run into one")
        if not before.startswith("--") or spelled(before) in may_be_bare:
            raise ConfigError(f"the config file comes first, before all flags; move {word} there")


def _too_many(word: str, flags: Sequence[str]) -> str:
    """What to say of a word that no flag has taken."""
    if word.startswith("-"):
        return f"unknown flag {word}; `qdora train --help_all` lists them all"
    before = [flag for flag in flags[: flags.index(word)] if flag.startswith("--")]
    after = f" after {before[-1].partition('=')[0]}" if before else ""
    return f"one word too many: {word!r}{after}; give one value, in quotes if it holds spaces"


def _expand_home(run: RunArguments, training: Any) -> None:
    """`~` in a config, which no shell has seen."""
    for arguments, names in ((run, _PLACES), (training, ("chat_template_path", "resume_from_checkpoint"))):
        for name in names:
            if value := getattr(arguments, name):
                setattr(arguments, name, expanduser(value))


def _evaluation_defaults(flags: Sequence[str], logging_steps: float) -> dict[str, Any]:
    """With data to evaluate on, and nothing else said: evaluate after each epoch, save then too, and keep the best."""
    if not (_value_of("eval_dataset", flags) or _is_above_zero(_value_of("validation_split_percentage", flags))):
        return {}
    defaults: dict[str, Any] = {}
    strategy = _value_of("eval_strategy", flags)
    if strategy is None:
        strategy = defaults["eval_strategy"] = "steps" if _is_given("eval_steps", flags) else "epoch"
    if strategy == "no" or any(_is_given(name, flags) for name in ("save_strategy", "save_steps")):
        return defaults
    defaults |= {"save_strategy": strategy, "load_best_model_at_end": True}
    # Without its own, evaluation takes the steps of logging.
    name = next((name for name in ("eval_steps", "logging_steps") if _is_given(name, flags)), None)
    if strategy == "steps":
        steps = logging_steps if name is None else _value_of(name, flags)
        try:
            defaults["save_steps"] = float(str(steps))
        except ValueError:
            raise ConfigError(f"--{name} must be a number, found {steps!r}") from None
    return defaults


def _is_above_zero(text: str | None) -> bool:
    try:
        return text is not None and float(text) > 0
    except ValueError:
        return True  # to be complained of by whoever reads it


def parse_estimate(arguments: Sequence[str]) -> tuple[RunArguments, Any]:
    """Parse `[CONFIG.yaml] [--flag value …]` of a run that will not be started: it needs no data and no output.

    Returns, Raises: as `parse_train`.
    """
    flags = list(arguments)
    start = 1 if flags and not flags[0].startswith("-") else 0
    return _parse([*flags[:start], *_NOT_STARTED, *flags[start:]])


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """A mapping as command-line flags: lists as several values, mappings as JSON, None and empty lists left out.

    Raises:
        ConfigError: a name that is no text.
    """
    flags = []
    for name, value in settings.items():
        if not isinstance(name, str):
            raise ConfigError(f"a setting's name must be text, found {name!r}")
        if value is None and name == "max_length":
            raise ConfigError("max_length must be a number of tokens, for memory is reckoned with it; found null")
        if value is None or (isinstance(value, list | tuple) and not value):
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
    """The adapter that the flags describe.

    Raises:
        ConfigError: a value is out of its range.
    """
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
        modules_to_save=tuple(run.modules_to_save),
        dtype=run.adapter_dtype,
    )


def rates(run: RunArguments, training: Any) -> Rates:
    """How fast each part of the adapter learns.

    Raises:
        ConfigError: a rate or a decay is out of its range.
    """
    return Rates(
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        magnitude_learning_rate=run.magnitude_learning_rate,
        magnitude_weight_decay=run.magnitude_weight_decay,
        b_ratio=run.loraplus_lr_ratio,
    )


class _Parser(HfArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> Any:
        raise ConfigError(_in_our_words(message))


def _in_our_words(message: str) -> str:
    """argparse's complaint about a value that is not among the choices, with the nearest of them instead of all."""
    found = re.fullmatch(r"argument (--\w+)\S*: invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
    if found is None:
        return message
    flag, value, choices = found.groups()
    known = [choice.strip("' ") for choice in choices.split(",")]
    return f"{flag} knows no {value!r}{did_you_mean(value, known) or '; it knows ' + ', '.join(known)}"


def flag_parser(verb: str) -> HfArgumentParser:
    """Our flags and all of TRL's `SFTConfig`, as argparse knows them."""
    from trl import SFTConfig

    parser = _Parser((RunArguments, SFTConfig), add_help=False, allow_abbrev=False, prog=f"qdora {verb}")
    parser.set_defaults(**DEFAULTS)
    return parser


def all_flags(verb: str) -> str:
    """Every flag there is, for `--help_all`."""
    first = "MODEL" if verb == "estimate" else "[CONFIG.yaml]"
    parser = flag_parser(verb)
    parser.usage = f"qdora {verb} {first} [--flag value ...]"
    return parser.format_help().rstrip()


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_bare_fsdp(flags: Sequence[str]) -> list[str]:
    """`--fsdp true`, as a file says it, as the bare `--fsdp` that transformers understands; and none for false."""
    plain: list[str] = []
    for flag in flags:
        value = flag.partition("=")[2].lower() if flag.startswith("--fsdp=") else flag.lower()
        asked = flag.startswith("--fsdp=") or plain[-1:] == ["--fsdp"]
        if asked and value in ("true", "false"):
            plain = [flag for flag in plain if flag != "--fsdp"] + ["--fsdp"] * (value == "true")
        else:
            plain.append(flag)
    return plain


def _with_plain_bf16(flags: Sequence[str]) -> list[str]:
    """`--bf16 true` as `--dtype bfloat16`: with all weights in it autocast has nothing to do, and CPUs know it too.

    Beside another `--dtype` it means autocast, and beside `--fp16` nothing; both are left to the trainer. Bare it is
    on, as `--fp16` is, which argparse does not take from a flag that may be left open.
    """
    ends = [i + 1 == len(flags) or flags[i + 1].startswith("--") for i in range(len(flags))]
    flags = ["--bf16=true" if flag == "--bf16" and bare else flag for flag, bare in zip(flags, ends, strict=True)]
    if not _is_on("bf16", flags) or _is_on("fp16", flags) or _value_of("dtype", flags) not in (None, "bfloat16"):
        return [*flags]
    return [*flags, "--bf16", "false", "--dtype", "bfloat16"]


def _is_given(name: str, flags: Sequence[str]) -> bool:
    return any(flag == f"--{name}" or flag.startswith(f"--{name}=") for flag in flags)


def _is_on(name: str, flags: Sequence[str]) -> bool:
    """Whether a switch is given, bare or with a value, and not turned off by that."""
    return _is_given(name, flags) and str(_value_of(name, flags)).lower() not in ("false", "f", "no", "n", "0")


def _value_of(name: str, flags: Sequence[str]) -> str | None:
    """The value that a flag has on this command line, the last if it stands there twice."""
    value = None
    for i, flag in enumerate(flags):
        if flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
        elif flag == f"--{name}" and i + 1 < len(flags):
            value = flags[i + 1]
    return value


def _suggestion(name: str, known: set[str]) -> str:
    ours = [item.name for item in dataclasses.fields(RunArguments)]
    near = nearest(name, [*ours, *sorted(k.replace("-", "_") for k in known)], OTHER_NAMES)
    return "; `qdora train --help_all` lists them all" if near is None else f"; did you mean --{near}?"
