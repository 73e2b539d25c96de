"""What `--help` shows: for each verb a screen of 80 columns and 40 lines that a newcomer can read."""

from __future__ import annotations

from collections.abc import Sequence

from qdora.nearest import did_you_mean
from qdora.parsers import PARSERS

__all__ = ["VERBS", "asked_for", "unknown_verb"]

VERBS = {
    "init": "a commented config for a model, data and memory",
    "estimate": "what a training run will need of memory, and a plan that fits",
    "quantize": "a 16-bit model to an NF4 checkpoint",
    "train": "an adapter, from a model and a data file",
    "evaluate": "base, adapter and merged model side by side",
    "chat": "talk to a model, without its adapter and with it",
    "inspect": "what training changed, layer by layer",
    "merge": "base and adapter to a plain 16-bit model",
    "completion": "let your shell complete verbs and flags",
}

_OVERVIEW = "\n".join(
    [
        "usage: qdora VERB ...",
        "",
        "Fine-tune a large language model on one GPU: NF4 base weights, DoRA adapters.",
        "",
        *(f"  {name:<12}{what}" for name, what in VERBS.items()),
        "",
        "`qdora VERB --help` shows the flags of one. From a model and a file to a model",
        "of your own:",
        "",
        "  qdora init MODEL notes.jsonl --memory 8GB",
        "  qdora train qdora.yaml",
        "  qdora evaluate MODEL --adapter notes-adapter --dataset notes.jsonl",
        "  qdora merge MODEL notes-adapter merged",
    ]
)

_TRAIN = """\
usage: qdora train [CONFIG.yaml] [--flag value ...]

Train an adapter. Flags override the config file; either alone suffices.

  --model_name_or_path           an NF4 checkpoint, a 16-bit model or a Hub id
  --dataset                      a .jsonl, .json, .csv, .parquet file, Hub data
  --output_dir                   where the adapter goes, and a report to read

evaluation, which also chooses the checkpoint that is kept:
  --validation_split_percentage  so much is kept back to evaluate on, or
  --eval_dataset                 data of its own for that
  --eval_exact_match             answer so many rows each time, count matches
  --early_stopping_patience      stop after so many evaluations without a better

adapter:
  --lora_r, --lora_alpha         rank [16] and strength [32]
  --lora_target_modules          names, one regular expression, or [all-linear]
  --use_dora                     [true]; false leaves the magnitude out (LoRA)
  --magnitude_learning_rate      if other than --learning_rate
  --freeze                       magnitude or direction: train the other alone
  --init_lora_weights            loftq begins with the error of rounding to NF4

training, by Hugging Face's names:
  --learning_rate, --lr_scheduler_type, --optim          [2e-4, linear, AdamW]
  --num_train_epochs, --max_steps                        [3 epochs]
  --per_device_train_batch_size, --gradient_accumulation_steps   [4, 1]
  --max_length, --packing        longer rows are cut [1024]; rows end to end
  --eval_steps, --save_steps, --logging_steps, --report_to, --seed
  --resume_from_checkpoint       `last`, or a checkpoint's directory

memory:
  --memory                       make the run fit in this, such as 8GB
  --stream_base                  base weights on the host, all but two layers
  --hold_outputs                 faster DoRA, for one more tensor a layer; by
                                 itself if --memory has room
  --dry_run                      print what the run needs, and stop

`qdora train --help_all` lists every flag there is."""

_ESTIMATE = """\
usage: qdora estimate MODEL [--memory SIZE] [training flags]

What `qdora train` will need at its peak, part by part; from config.json alone,
without weights or a GPU.

  MODEL                          a directory, its config.json, a Hub id, or the
                                 CONFIG.yaml of a run
  --memory                       find the fastest plan that fits, such as 8GB
  --max_length                   tokens of the longest row [1024]
  --per_device_train_batch_size  rows of a micro-batch [4]
  --gradient_accumulation_steps  micro-batches a step [1]
  --lora_r, --lora_target_modules, --use_dora, --optim, --packing, ...
                                 as in `qdora train`
  --activation_offloading, --embedding_on_host, --stream_base,
  --loss_chunk_size, --hold_outputs
                                 what a plan is made of, if you choose yourself
  --use_cpu true                 reckon for the CPU instead of an accelerator

`qdora estimate --help_all` lists every flag there is."""


def asked_for(given: Sequence[str]) -> str | None:
    """The screen that a command line asks for, if it asks for one that is ready."""
    if not given or given[0] in ("-h", "--help", "help"):
        return _OVERVIEW
    verb, rest = given[0], given[1:]
    bare = not rest and verb != "init"
    if verb not in VERBS or not (bare or "-h" in rest or "--help" in rest):
        return None
    if verb in PARSERS:
        return PARSERS[verb]().format_help().rstrip()
    return _TRAIN if verb == "train" else _ESTIMATE


def unknown_verb(name: str) -> str:
    """What to say of a verb that there is not."""
    return f"unknown verb {name!r}{did_you_mean(name, VERBS) or '; `qdora --help` lists them'}"
