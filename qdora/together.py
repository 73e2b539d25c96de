"""Flags that each are right and together are not, found before anything is loaded."""

from __future__ import annotations

from typing import Any

from qdora.errors import ConfigError
from qdora.flags import OWN_OPTIMIZERS, RunArguments, has_perplexity
from qdora.nearest import did_you_mean
from qdora.shards import parse_size

__all__ = ["check_evaluation", "check_sharded", "check_together"]

_CHOICES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "adapter_dtype": ("bfloat16", "float32"),
    "init_lora_weights": ("default", "loftq"),
    "freeze": ("none", "magnitude", "direction"),
    "on_nonfinite": ("stop", "skip"),
}
_LEAST = {
    "max_length": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
}
# TRL's flags for what is done here in another way: the usual value, and what to do instead.
_NOT_USED = {
    "dataset_text_field": ("text", "name the column `text`"),
    "eos_token": (None, "answers end with the tokenizer's own; change it there"),
    "model_init_kwargs": (None, "the model is loaded by qdora; --dtype and --load_in_4bit say how"),
}


def check_evaluation(run: RunArguments, training: Any) -> None:
    """
    Raises:
        ConfigError: what is evaluated, when and on what does not fit together.
    """
    has_data = bool(run.eval_dataset or run.validation_split_percentage)
    strategy = training.eval_strategy.value
    if strategy != "no" and not has_data:
        raise ConfigError(f"--eval_strategy {strategy} needs an --eval_dataset or a --validation_split_percentage")
    if run.eval_dataset and run.validation_split_percentage:
        raise ConfigError("--eval_dataset and --validation_split_percentage both say what to evaluate on; choose one")
    if not 0 <= run.validation_split_percentage < 100:
        raise ConfigError(
            f"--validation_split_percentage must be at least 0 and below 100, found {run.validation_split_percentage:g}"
        )
    if run.eval_exact_match < 0:
        raise ConfigError(f"--eval_exact_match is a number of rows, found {run.eval_exact_match}")
    if run.eval_exact_match and strategy == "no":
        raise ConfigError("--eval_exact_match answers rows at each evaluation; it needs data to evaluate on")
    _check_metric(run, training)
    if run.early_stopping_patience is None:
        if run.early_stopping_threshold:
            raise ConfigError("--early_stopping_threshold is for --early_stopping_patience; give that too")
        return
    if run.early_stopping_patience < 1:
        raise ConfigError(f"--early_stopping_patience must be at least 1, found {run.early_stopping_patience}")
    if strategy == "no" or not training.load_best_model_at_end:
        raise ConfigError(
            "--early_stopping_patience needs evaluations and the best checkpoint: give --eval_dataset or "
            "--validation_split_percentage, and --load_best_model_at_end true if you set --save_strategy yourself"
        )


def _check_metric(run: RunArguments, training: Any) -> None:
    """A metric that is never measured would end a run at its first evaluation."""
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric == "exact_match" and not run.eval_exact_match:
        raise ConfigError("--metric_for_best_model exact_match needs --eval_exact_match, the number of rows to answer")
    # the perplexity of a loss that is no likelihood means nothing
    known = ["loss", *["perplexity"] * has_perplexity(training), "exact_match"]
    if metric not in known:
        raise ConfigError(f"--metric_for_best_model must be one of {', '.join(known)}, found {metric!r}")


def check_together(run: RunArguments, training: Any) -> None:
    """
    Raises:
        ConfigError: a value is out of its range, has nothing to act on, or contradicts another.
    """
    if run.loss_chunk_size is not None:
        parse_size(run.loss_chunk_size)
    for name, known in _CHOICES.items():
        if (value := getattr(run, name)) is not None and value not in known:
            raise ConfigError(
                f"--{name} must be one of {', '.join(known)}, found {value!r}{did_you_mean(value, known)}"
            )
    if training.fp16 and run.adapter_dtype == "bfloat16":
        # CUDA has no kernel that takes the scale out of gradients in bfloat16 (pytorch#127176).
        raise ConfigError(
            "--fp16 scales the loss, which torch undoes in gradients in float32 alone; found --adapter_dtype bfloat16, "
            "leave it out or pass float32"
        )
    if run.dtype == "float16" and not training.fp16:
        # With 4,096 tokens in the mean, adapters' gradients were wrong by 7 % in the median, and by all that they are
        # in some layers; with the loss scaled, by 0.3 % at most.
        raise ConfigError(
            "--dtype float16 loses small gradients unless the loss is scaled; pass --fp16 true too (on a GPU), or "
            "--dtype bfloat16 or float32"
        )
    for name, (usual, instead) in _NOT_USED.items():
        if getattr(training, name, usual) != usual:
            raise ConfigError(f"--{name} has no effect here: {instead}")
    if run.freeze == "magnitude" and (run.magnitude_learning_rate or run.magnitude_weight_decay):
        raise ConfigError("--freeze magnitude leaves nothing that its own rate or decay could act on; leave one out")
    if run.freeze == "direction" and run.loraplus_lr_ratio != 1:
        raise ConfigError("--freeze direction leaves no B that --loraplus_lr_ratio could act on; leave one out")
    if not run.use_dora and (run.freeze == "magnitude" or run.magnitude_learning_rate or run.magnitude_weight_decay):
        raise ConfigError("--use_dora false leaves the magnitude out; there is none to freeze or to give a rate")
    if run.original_model_name_or_path and run.init_lora_weights != "loftq":
        raise ConfigError("--original_model_name_or_path is for --init_lora_weights loftq")
    if training.activation_offloading and not training.gradient_checkpointing:
        raise ConfigError(
            "--activation_offloading keeps the inputs of recomputed layers; it needs gradient_checkpointing"
        )
    if run.hold_outputs and not training.gradient_checkpointing:
        raise ConfigError("--hold_outputs spares a part of the recompute; it needs gradient_checkpointing")
    if training.truncation_mode != "keep_start":
        raise ConfigError(
            f"--truncation_mode {training.truncation_mode}: long rows lose their end, only keep_start fits"
        )
    for name, least in _LEAST.items():
        value = getattr(training, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, found {value}")
    if training.max_steps == 0 or training.max_steps < -1:
        raise ConfigError(f"--max_steps must be at least 1, or -1 for whole epochs, found {training.max_steps}")
    if not training.num_train_epochs > 0 and training.max_steps <= 0:
        raise ConfigError(f"--num_train_epochs must be above 0, found {training.num_train_epochs:g}")


def check_sharded(run: RunArguments, training: Any) -> None:
    """
    Raises:
        ConfigError: a flag does not go together with FSDP2.
    """
    if run.stream_base or run.embedding_on_host:
        raise ConfigError(
            "--stream_base and --embedding_on_host keep weights on the host, --fsdp shards them; choose one"
        )
    if run.memory is not None or run.dry_run:
        raise ConfigError(
            "--memory and --dry_run reckon one device that holds the whole model; leave them out with --fsdp"
        )
    if run.init_lora_weights == "loftq" or run.eval_exact_match:
        raise ConfigError("--init_lora_weights loftq and --eval_exact_match need whole weights, which --fsdp shards")
    if run.modules_to_save:
        raise ConfigError("--modules_to_save trains whole modules, which --fsdp would shard; leave one of them out")
    if training.fp16:
        raise ConfigError("--fp16 scales the loss, which --fsdp does not support; use --dtype bfloat16")
    if training.optim not in OWN_OPTIMIZERS:
        raise ConfigError(f"--optim {training.optim} does not know shards; with --fsdp use adamw_torch")
