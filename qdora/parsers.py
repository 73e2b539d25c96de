"""The command lines of all verbs but `train` and `estimate`, whose flags are dataclasses (see `arguments`).

Nothing heavy is imported here, so that a question about flags is answered at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from os.path import expanduser
from typing import Any, NoReturn

from qdora.errors import ConfigError
from qdora.nearest import nearest, spelled

__all__ = ["PARSERS", "SHELLS", "parse"]

# What may name a path; a shell expands `~` only where a word begins with it, and not in `--flag=~/x`.
_PLACES = {"model", "base", "adapter", "merged", "out", "dataset", "chat_template_path", "output_file", "picture"}
SHELLS = ("bash", "zsh", "fish")


def parse(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    """What a command line says, by the names of the verb's parameters.

    Raises:
        ConfigError: an unknown flag (the nearest one is suggested), a missing or a bad value.
    """
    parser = PARSERS[verb]()
    options, unknown = parser.parse_known_args([spelled(argument) for argument in arguments])
    flags = [name for name in unknown if name.startswith("-")]
    if flags:
        known = [name for action in parser._actions for name in action.option_strings]
        near = nearest(flags[0].partition("=")[0], known)
        meant = f"did you mean {near}?" if near else f"`{parser.prog} --help` lists what there is"
        raise ConfigError(f"unknown flag {flags[0].partition('=')[0]}; {meant}")
    if unknown:
        raise ConfigError(f"one word too many: {unknown[0]!r}; `{parser.prog} --help` shows how it goes")
    del options.help
    for name in _PLACES & vars(options).keys():
        if value := getattr(options, name):
            setattr(options, name, expanduser(value))
    return options


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(
            prog=f"qdora {verb}",
            description=description,
            allow_abbrev=False,
            add_help=False,
            formatter_class=_Formatter,
        )
        self.add_argument("-h", "--help", action="store_true", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        if "not allowed with argument" in message:
            raise ConfigError(f"{message.removeprefix('argument ')}; choose one")
        raise ConfigError(f"{message}; `{self.prog} --help` lists what there is")


class _Formatter(argparse.HelpFormatter):
    """A short usage line, and help beside its flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=79)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        words = [action.metavar if action.required else f"[{action.metavar}]" for action in actions if _is_word(action)]
        super().add_usage(" ".join(["%(prog)s", *map(str, words), "[--flag value ...]"]), actions, groups, prefix)


def _is_word(action: argparse.Action) -> bool:
    return not action.option_strings


def _quantize() -> _Parser:
    parser = _Parser("quantize", "A 16-bit model to an NF4 checkpoint, a tensor at a time.")
    parser.add_argument("model", metavar="MODEL", help="a directory, a Hub id, or a GGUF file")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument("--skip_modules", nargs="*", default=(), metavar="NAME", help="linears to leave in 16 bits")
    parser.add_argument(
        "--no_double_quant",
        action="store_false",
        dest="double_quant",
        help="keep the absmax in fp32 (4.5 bits per weight)",
    )
    parser.add_argument("--dtype", default="bfloat16", metavar="TYPE", help="of what is not quantized [bfloat16]")
    parser.add_argument("--device", help="where to quantize [the accelerator, if there is one]")
    _add_output(parser)
    return parser


def _merge() -> _Parser:
    parser = _Parser("merge", "Base and adapter to a plain 16-bit model, compared with the adapter.")
    parser.add_argument("base", metavar="BASE", help="the NF4 checkpoint that was trained on, or a 16-bit model")
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter directory, ours or PEFT's")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument("--dtype", default="float16", metavar="TYPE", help="float16 or bfloat16 [float16]")
    verify = parser.add_mutually_exclusive_group()
    verify.add_argument("--verify", action="store_true", default=None, help="compare even if memory is short")
    verify.add_argument("--no_verify", action="store_false", dest="verify", default=None, help="do not compare")
    _add_other_base(parser)
    parser.add_argument(
        "--onto_original", action="store_true", help="onto a 16-bit base as it is, not as NF4 rounds it"
    )
    _add_output(parser)
    return parser


def _evaluate() -> _Parser:
    parser = _Parser("evaluate", "Base, adapter and merged model on the same rows, in one table.")
    parser.add_argument("model", metavar="MODEL", help="an NF4 checkpoint, a 16-bit model or a Hub id")
    parser.add_argument("--dataset", required=True, metavar="FILE", help="the data, in a layout that train knows")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter trained on MODEL")
    parser.add_argument("--merged", metavar="DIR", help="a merged model")
    parser.add_argument("--dataset_split", default="test", metavar="NAME", help="of a Hub data set [test]")
    _add_data(parser)
    parser.add_argument("--max_rows", type=int, metavar="N", help="the first N rows alone")
    parser.add_argument(
        "--exact_match",
        dest="exact_match_rows",
        type=int,
        default=100,
        metavar="N",
        help="answer and compare N rows [100]",
    )
    parser.add_argument(
        "--choices",
        nargs="+",
        default=(),
        metavar="WORD",
        help="multiple choice between words of which each answer holds one [the data's column `choices`]",
    )
    parser.add_argument("--max_length", type=int, metavar="N", help="cut rows to N tokens [what MODEL takes]")
    parser.add_argument(
        "--per_device_eval_batch_size", dest="batch_size", type=int, default=8, metavar="N", help="rows at once [8]"
    )
    parser.add_argument("--completion_only_loss", type=_truth, default=True, metavar="BOOL", help="[true]")
    parser.add_argument("--output_file", metavar="FILE", help="write all figures there, as JSON")
    _add_loading(parser)
    return parser


def _chat() -> _Parser:
    parser = _Parser("chat", "Talk to a model. /help lists what it understands besides questions.")
    parser.add_argument("model", metavar="MODEL", help="an NF4 checkpoint, a 16-bit or merged model, a Hub id")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter trained on MODEL")
    parser.add_argument("--compare", action="store_true", help="answer twice: without the adapter, and with it")
    parser.add_argument(
        "--prompt", action="append", dest="prompts", metavar="TEXT", help="answer this and exit; may be repeated"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system's message")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="of an answer [512]")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token [0]")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X", help="sample from the likeliest share [1]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling [0]")
    _add_loading(parser)
    return parser


def _inspect() -> _Parser:
    parser = _Parser("inspect", "What an adapter is, and what training changed, layer by layer.")
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter directory, ours or PEFT's")
    parser.add_argument("--base", metavar="MODEL", help="what it was trained on [what it says itself]")
    parser.add_argument("--picture", metavar="FILE.png", help="[ADAPTER/inspect.png]")
    parser.add_argument("--output_file", metavar="FILE", help="write all figures there, as JSON")
    _add_trust(parser)
    return parser


def _init() -> _Parser:
    parser = _Parser("init", "A commented config for this model, this data and this memory. Nothing is asked.")
    parser.add_argument("model", metavar="MODEL", help="an NF4 checkpoint, a 16-bit model or a Hub id")
    parser.add_argument("dataset", metavar="DATA", help="a .jsonl, .json, .csv or .parquet file, or a Hub data set")
    parser.add_argument("--memory", metavar="SIZE", help="find the fastest plan that fits in this, such as 8GB")
    _add_data(parser)
    parser.add_argument("--out", default="qdora.yaml", metavar="FILE", help="the file to write [qdora.yaml]")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument(
        "--use_cpu", type=_truth, nargs="?", const=True, default=False, metavar="BOOL", help="reckon for the CPU"
    )
    _add_trust(parser)
    return parser


def _add_data(parser: _Parser) -> None:
    parser.add_argument("--dataset_config", metavar="NAME", help="of a Hub data set that has several")
    parser.add_argument("--chat_template_path", metavar="FILE", help="a Jinja file, instead of the tokenizer's")


def _completion() -> _Parser:
    parser = _Parser("completion", "Print what lets a shell complete qdora's verbs and flags.")
    parser.add_argument("shell", metavar="SHELL", help=", ".join(SHELLS))
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of an output file [5GB]")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds a model")
    _add_trust(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="of the arithmetic [bfloat16; float16 for a float16 model; float32 on a CPU slow in those]",
    )
    parser.add_argument("--device", help="[the accelerator, if there is one]")
    parser.add_argument(
        "--load_in_4bit", type=_truth, metavar="BOOL", help="quantize a 16-bit MODEL [if the adapter learned on NF4]"
    )
    for name, what in (("stream_base", "base weights stay"), ("embedding_on_host", "the embedding stays")):
        parser.add_argument(
            f"--{name}", type=_truth, nargs="?", const=True, default=False, metavar="BOOL", help=f"{what} on the host"
        )
    _add_other_base(parser)
    _add_trust(parser)


def _add_other_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow_other_base", action="store_true", help="the adapter on weights that it was not trained on"
    )


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust_remote_code", action="store_true", help="let the model run code of its own")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "init": _init,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "chat": _chat,
    "inspect": _inspect,
    "merge": _merge,
    "completion": _completion,
}
