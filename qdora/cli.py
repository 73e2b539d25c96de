"""The command line: the verbs, over the functions of the same names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from qdora import __version__
from qdora.arguments import common_flags
from qdora.distributed import run_to_the_end, say
from qdora.errors import ConfigError, QDoRAError, reason
from qdora.estimate import estimate_from_arguments
from qdora.merge import merge
from qdora.quantize import quantize
from qdora.train import train_from_arguments

__all__ = ["main"]

_TRAIN_HELP = """\
usage: qdora train [CONFIG.yaml] [--flag value ...]

Fine-tune an adapter. Flags override the config file; either alone suffices.

model, data and adapter:
{ours}

training (all of TRL's SFTConfig is accepted; the most used):
  --output_dir                   where the adapter goes
  --num_train_epochs             [3]
  --max_steps                    instead of epochs
  --per_device_train_batch_size  [4]
  --gradient_accumulation_steps  [1]
  --learning_rate                [2e-4]
  --lr_scheduler_type            linear, cosine, constant, ...
  --max_length                   longer rows are cut, and counted [1024]
  --optim                        [AdamW, compensated for bf16], adamw_8bit, paged_adamw_32bit, ...
  --eval_strategy, --eval_steps, --save_steps, --logging_steps, --report_to, --seed
  --resume_from_checkpoint       `last`, or a checkpoint's directory
"""

_ESTIMATE_HELP = """\
usage: qdora estimate MODEL [--memory SIZE] [training flags]

What `qdora train` will need at its peak, part by part; from config.json alone, without weights or a GPU.

  MODEL                          a directory with config.json, that file, a Hub id, or CONFIG.yaml of a run
  --memory                       find the fastest plan that fits in this, such as 8GB
  --max_length                   tokens of the longest row [1024]
  --per_device_train_batch_size  rows of a micro-batch [4]
  --gradient_accumulation_steps  micro-batches a step [1]
  --lora_r, --lora_target_modules, --use_dora, --optim, --packing, ...
                                 as in `qdora train`
  --activation_offloading, --embedding_on_host, --stream_base, --loss_chunk_size
                                 what a plan is made of, if you choose yourself
  --use_cpu true                 reckon for the CPU; by default it is for an accelerator
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit status: 0, or 2 after one line on standard error that says what was wrong and what to do; 130 if
        interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_to_the_end(lambda: _run(given))


def _run(given: list[str]) -> tuple[int, str]:
    """The exit status and what to say on standard error."""
    try:
        if given[:1] == ["train"]:
            _train(given[1:])
        elif given[:1] == ["estimate"]:
            _estimate(given[1:])
        else:
            _quantize_or_merge(_parser().parse_args(given))
    except QDoRAError as error:
        return 2, f"qdora: {' '.join(str(error).split())}"
    except torch.OutOfMemoryError as error:
        return 2, f"qdora: out of memory: {reason(error)}; a smaller model, batch or length may fit"
    except KeyboardInterrupt:
        return 130, "qdora: interrupted"
    return 0, ""


def _train(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        say(_TRAIN_HELP.format(ours=common_flags()))
        return
    report = train_from_arguments(arguments)
    if report is None:
        return  # a dry run, which has said all
    say(str(report))
    say(f"next: qdora merge {report.base} {report.output_dir} OUT")


def _estimate(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_ESTIMATE_HELP)
        return
    print(estimate_from_arguments(arguments))


def _quantize_or_merge(options: argparse.Namespace) -> None:
    if options.verb == "quantize":
        report = quantize(
            options.model,
            options.out,
            skip_modules=options.skip_modules,
            double_quant=not options.no_double_quant,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            device=options.device,
            overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code,
        )
        print(report)
        print(f"next: qdora train --model_name_or_path {options.out} --dataset DATA.jsonl --output_dir ADAPTER")
        return
    merged = merge(
        options.base,
        options.adapter,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        verify=options.verify,
        onto_original=options.onto_original,
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
    )
    print(merged)


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; `{self.prog} --help` lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qdora", description="Fine-tune a large language model on one GPU: NF4 base, DoRA adapter.")
    parser.add_argument("--version", action="version", version=f"qdora {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    verb = verbs.add_parser("quantize", help="a 16-bit model to an NF4 checkpoint", allow_abbrev=False)
    verb.add_argument("model", metavar="MODEL", help="a directory, a Hub id, or a GGUF file")
    verb.add_argument("out", metavar="OUT", help="the directory to write")
    verb.add_argument("--skip_modules", nargs="*", default=(), metavar="NAME", help="linears to leave in 16 bits")
    verb.add_argument("--no_double_quant", action="store_true", help="keep the absmax in fp32 (4.5 bits per weight)")
    verb.add_argument("--dtype", default="bfloat16", help="of what is not quantized [bfloat16]")
    verb.add_argument("--device", help="where to quantize [the accelerator, if there is one]")
    _add_common(verb)
    verbs.add_parser("estimate", help="what a training run will need of memory, and a plan that fits")
    verbs.add_parser("train", help="an adapter, from an NF4 checkpoint and a data file")
    verb = verbs.add_parser("merge", help="base and adapter to a plain 16-bit model", allow_abbrev=False)
    verb.add_argument("base", metavar="BASE", help="the NF4 checkpoint that was trained on, or a 16-bit model")
    verb.add_argument("adapter", metavar="ADAPTER", help="an adapter directory")
    verb.add_argument("out", metavar="OUT", help="the directory to write")
    verb.add_argument("--dtype", default="float16", help="float16 or bfloat16 [float16]")
    verb.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare the adapter with the merged model [if the model fits in memory]",
    )
    verb.add_argument(
        "--onto_original", action="store_true", help="merge onto a 16-bit base as it is, not as NF4 rounds it"
    )
    _add_common(verb)
    return parser


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of an output file [5GB]")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it holds something")
    verb.add_argument("--trust_remote_code", action="store_true", help="let the model run code of its own")
