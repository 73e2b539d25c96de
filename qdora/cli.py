"""The command line: the verbs, over the functions of the same names.

Each verb is imported when it runs. Loading torch and transformers takes seconds, and a question about flags, or an
answer to a mistyped one, should not.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qdora import __version__, screens
from qdora.errors import ConfigError, QDoRAError, out_of_memory, reason
from qdora.parsers import SHELLS, parse

__all__ = ["main"]

# What a directory that may not be entered, a name that is too long or a disk that fails say, wherever it is noticed.
_PLACES_FAULT = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EIO, errno.ENOSPC)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit status: 0, or 2 after one line on standard error that says what was wrong and what to do; 130 or
        143 if SIGINT or SIGTERM ended it, 141 if nobody reads the output any more.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    try:
        with _seen_interrupts() as seen:
            status = _answer(given, seen)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except ImportError:
        if not seen:
            raise
        return 130
    except OSError as error:
        lost = _lost_output(error)
        if lost is None:
            raise
        print(lost[1], end="\n" if lost[1] else "", file=sys.stderr)
        return lost[0]


@contextmanager
def _seen_interrupts() -> Iterator[list[int]]:
    """The SIGINTs that came within it: a library that is being imported may swallow one, and then fail to import."""
    seen: list[int] = []

    def see(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, see)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _answer(given: Sequence[str], interrupts: Sequence[int]) -> int:
    screen = f"qdora {__version__}" if given[:1] == ["--version"] else screens.asked_for(given)
    if screen is not None:
        print(screen)
        return 0
    if given[0] not in _VERBS:
        print(f"qdora: {screens.unknown_verb(given[0])}", file=sys.stderr)
        return 2
    from qdora.distributed import run_to_the_end

    if interrupts:
        raise KeyboardInterrupt
    return run_to_the_end(lambda: _run(given[0], list(given[1:])))


def _open_closed_streams() -> None:
    """What the shell closed (`>&-`) goes nowhere, rather than into whichever file would be opened next."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (as long as the process)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _lost_output(error: OSError) -> tuple[int, str] | None:
    """The exit status and a line if standard output takes no more; None if the error is about something else."""
    line = ""
    if error.filename is not None:
        return None
    if not isinstance(error, BrokenPipeError):
        try:
            print(flush=True)  # fails again, or is an empty line before a traceback
            return None
        except OSError as fault:
            line = f"qdora: cannot write to standard output: {fault.strerror}; send it somewhere else"
    # Python is not to complain when it flushes what is left.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return (2, line) if line else (141, "")


def _run(verb: str, arguments: list[str]) -> tuple[int, str]:
    """The exit status and what to say on standard error."""
    from qdora.distributed import is_main
    from qdora.signals import ending_cleanly

    try:
        with ending_cleanly():
            _VERBS[verb](arguments)
            sys.stdout.flush()
    except QDoRAError as error:
        return 2, f"qdora: {' '.join(str(error).split())}"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return 2, f"qdora: out of memory: {reason(error)}; a smaller model, batch or length may fit"
    except OSError as error:
        lost = _lost_output(error)
        if lost is not None:
            return lost
        if error.errno not in _PLACES_FAULT or not error.filename:
            raise
        return 2, f"qdora: {error.strerror}: {error.filename}; look at that place, or name another"
    except KeyboardInterrupt as stop:
        line = f"qdora: {str(stop) or 'interrupted'}"
        return getattr(stop, "status", 130), line if is_main() else ""
    return 0, ""


def _init(arguments: list[str]) -> None:
    options = vars(parse("init", arguments))
    from qdora.verbs.init import init

    report = init(**options)
    print(report)
    print(f"next: qdora train {report.path}")


def _estimate(arguments: list[str]) -> None:
    from qdora.arguments import all_flags
    from qdora.verbs.estimate import estimate_from_arguments

    print(all_flags("estimate") if "--help_all" in arguments else estimate_from_arguments(arguments))


def _quantize(arguments: list[str]) -> None:
    options = vars(parse("quantize", arguments))
    from qdora.verbs.quantize import quantize

    print(quantize(**options))
    print(f"next: qdora init {options['out']} DATA.jsonl")


def _train(arguments: list[str]) -> None:
    from qdora.arguments import all_flags
    from qdora.distributed import say
    from qdora.verbs.train import train_from_arguments

    if "--help_all" in arguments:
        say(all_flags("train"))
        return
    report = train_from_arguments(arguments)
    if report is None:
        return  # a dry run, which has said all
    say(str(report))
    say(f"next: qdora chat {report.base} --adapter {report.output_dir} --compare")
    say(f"      qdora merge {report.base} {report.output_dir} OUT")


def _evaluate(arguments: list[str]) -> None:
    options = vars(parse("evaluate", arguments))
    file = _writable(options.pop("output_file"), "answered", "models")
    from qdora.verbs.evaluate import evaluate

    report = evaluate(**options)
    print(report)
    _write_figures(report.to_dict(), file)


def _chat(arguments: list[str]) -> None:
    options = vars(parse("chat", arguments))
    from qdora.verbs.chat import chat

    chat(**options)


def _inspect(arguments: list[str]) -> None:
    options = vars(parse("inspect", arguments))
    file = _writable(options.pop("output_file"), "adapter", "most_in_magnitude")
    from qdora.verbs.inspect import inspect

    report = inspect(**options)
    print(report)
    _write_figures(report.to_dict(), file)


def _merge(arguments: list[str]) -> None:
    options = vars(parse("merge", arguments))
    from qdora.verbs.merge import merge

    print(merge(**options))
    print(f"next: qdora chat {options['out']}")


def _completion(arguments: list[str]) -> None:
    shell = parse("completion", arguments).shell
    if shell not in SHELLS:
        raise ConfigError(f"no completion for {shell!r}; there is {', '.join(SHELLS)}")
    import shtab

    print(shtab.complete(_whole_parser(), shell=shell))


def _whole_parser() -> argparse.ArgumentParser:
    """All verbs and flags in one tree, which only completion looks at."""
    from qdora.arguments import flag_parser
    from qdora.parsers import PARSERS

    whole = argparse.ArgumentParser(prog="qdora")
    verbs = whole.add_subparsers()
    for name, what in screens.VERBS.items():
        parser = PARSERS[name]() if name in PARSERS else flag_parser(name)
        verbs.add_parser(name, help=what, parents=[parser], add_help=False)
    return whole


def _writable(file: str | None, *facts: str) -> Path | None:
    """Where the figures go, found fault with before the long work; of earlier files only such figures are replaced."""
    from qdora.output import check_file

    return None if file is None else check_file(file, "--output_file", facts)


def _write_figures(figures: dict[str, Any], file: Path | None) -> None:
    from qdora.output import write_json, writing

    if file is not None:
        with writing(file):
            write_json(file, figures)


_VERBS: dict[str, Callable[[list[str]], None]] = {
    "init": _init,
    "estimate": _estimate,
    "quantize": _quantize,
    "train": _train,
    "evaluate": _evaluate,
    "chat": _chat,
    "inspect": _inspect,
    "merge": _merge,
    "completion": _completion,
}
