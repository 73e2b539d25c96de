"""The flags of `qdora train` that are ours: model, data, adapter, memory, and what to measure on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qdora.config import ALL_LINEAR

__all__ = [
    "DEFAULTS",
    "MEASURED_PLAINLY",
    "OTHER_NAMES",
    "OWN_OPTIMIZERS",
    "PLAIN_LOSSES",
    "RunArguments",
    "asks_to_resume",
    "has_perplexity",
    "loss_is_plain",
]

# Where our defaults differ from SFTConfig's: an adapter learns faster than a whole model, bf16 is the model's own
# dtype (so that autocast has nothing to do), and a loss that is not finite must be seen.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
}

# What other tools call it.
OTHER_NAMES = {
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "lora_modules_to_save": "modules_to_save",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "data": "dataset",
    "dataset_name": "dataset",
    "train_file": "dataset",
    "validation_file": "eval_dataset",
    "val_set_size": "validation_split_percentage",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "resume": "resume_from_checkpoint",
}

# The names under which AdamW means `optimizer.CompensatedAdamW`; any other name is the trainer's.
OWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# The likelihood alone. `chunked_nll` is what TRL called its own lean way before that became the plain one.
PLAIN_LOSSES = ("nll", "chunked_nll")
# What is measured by the likelihood. `dft` weighs tokens by their probability: it is small where a model is worst.
MEASURED_PLAINLY = (*PLAIN_LOSSES, "dft")


@dataclass
class RunArguments:
    """What to train on what; the names are those of TRL's and PEFT's flags where they have any."""

    model_name_or_path: str = field(metadata={"help": "an NF4 checkpoint, a 16-bit model directory or a Hub id"})
    dataset: str = field(metadata={"help": "a .jsonl, .json, .csv or .parquet file, or a data set on the Hub"})
    dataset_split: str = field(default="train", metadata={"help": "which split of a Hub data set"})
    dataset_config: str | None = field(default=None, metadata={"help": "which config of a Hub data set"})
    eval_dataset: str | None = field(default=None, metadata={"help": "likewise, to evaluate on"})
    eval_dataset_split: str = field(default="test", metadata={"help": "which split of a Hub data set to evaluate on"})
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "which config of a Hub data set to evaluate on"}
    )
    validation_split_percentage: float = field(
        default=0.0, metadata={"help": "take so much of the data to evaluate on, instead of --eval_dataset"}
    )
    eval_exact_match: int = field(
        default=0, metadata={"help": "answer so many of those rows at each evaluation, and count exact matches"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one"}
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "by how much it must be better"})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "of the arithmetic: bfloat16, float32, or float16 with --fp16; unless given, bfloat16, or float32 "
            "on a CPU that is slow in bfloat16"
        },
    )
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
    modules_to_save: list[str] = field(
        default_factory=list,
        metadata={"help": "modules to train whole beside the adapters, such as embed_tokens lm_head"},
    )
    adapter_dtype: str = field(
        default="bfloat16",
        metadata={"help": "of what trains: bfloat16 or float32; unless given, bfloat16, or float32 with --fp16"},
    )
    init_lora_weights: str = field(
        default="default", metadata={"help": "default, or loftq: begin with what rounding to NF4 took from the weights"}
    )
    original_model_name_or_path: str | None = field(
        default=None, metadata={"help": "the 16-bit original of an NF4 checkpoint, for loftq"}
    )
    magnitude_learning_rate: float | None = field(
        default=None, metadata={"help": "of the magnitudes, if other than --learning_rate"}
    )
    magnitude_weight_decay: float | None = field(
        default=None, metadata={"help": "of the magnitudes (towards the base's), if other than --weight_decay"}
    )
    loraplus_lr_ratio: float = field(
        default=1.0, metadata={"help": "learning rate of B by that of A (LoRA+, arXiv 2402.12354)"}
    )
    freeze: str = field(default="none", metadata={"help": "magnitude or direction: train the other part alone"})
    on_nonfinite: str = field(
        default="stop",
        metadata={"help": "stop, or skip a step whose loss or gradient is not finite (five in a row stop it)"},
    )
    stream_base: bool = field(
        default=False, metadata={"help": "leave base weights on the host, two layers at a time on the device"}
    )
    hold_outputs: bool | None = field(
        default=None,
        metadata={
            "help": "hold what each layer computes last instead of computing it twice: faster, for more memory; unless "
            "said, done if --memory has room for it"
        },
    )
    embedding_on_host: bool = field(default=False, metadata={"help": "leave the input embedding on the host"})
    loss_chunk_size: str | None = field(
        default=None, metadata={"help": "of the logits that exist at once [64MiB; 32MiB on the CPU]"}
    )
    memory: str | None = field(default=None, metadata={"help": "make the run fit in this, such as 8GB"})
    dry_run: bool = field(default=False, metadata={"help": "print what the run needs, and stop"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "write over an adapter that is there"})


def asks_to_resume(training: Any) -> bool:
    """Whether the flags name a checkpoint to go on from, or ask for the last one."""
    return str(training.resume_from_checkpoint).lower() not in ("none", "false")


def loss_is_plain(training: Any) -> bool:
    """Whether the flags ask for the likelihood alone, which needs no logits as a whole.

    `trainer` asks this of what TRL made of the flags, for TRL knows whether the model has experts to balance.
    """
    return training.loss_type in PLAIN_LOSSES and has_perplexity(training)


def has_perplexity(training: Any) -> bool:
    """Whether evaluations measure the likelihood."""
    balances = getattr(training, "router_aux_loss_coef", None)
    return training.loss_type in MEASURED_PLAINLY and not training.label_smoothing_factor and not balances
