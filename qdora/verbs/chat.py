"""`qdora chat`: a conversation in the terminal, with a model, with its adapter, or with both side by side.

A `Conversation` is one voice, a `Terminal` is where lines come from and where text goes, and `converse` stands between
them.

Under `compare` there are two conversations over one model, one of which switches the adapter off while it answers. Both
use the same chat template, so that nothing but the adapter tells them apart; their histories are separate, for each
must find its own earlier answers before it.

Ctrl-C is a wish to stop between two tokens, not an exception somewhere in the copy of a layer: while an answer comes,
the signal is only remembered, and looked for after each token.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdora.arithmetic import place_of
from qdora.conversation import Answer, Conversation, Sampling
from qdora.errors import ConfigError, DataError
from qdora.model import load_to_answer
from qdora.rows import holds_half_a_pair
from qdora.tokenizer import tokenizer_of

__all__ = ["Terminal", "chat", "converse"]

HELP = """\
/new          forget the conversation
/system TEXT  set the system message; without TEXT, remove it
/help         this list
/exit         end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next. After a space, / begins no command."""

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Terminal:
    """Where lines come from and where text goes."""

    read: Callable[[str], str]
    """Shows a prompt sign and returns a line; raises EOFError after the last one."""
    write: Callable[[str], None]
    """Shows a piece of an answer at once."""
    note: Callable[[str], None]
    """Shows a line that is no part of an answer."""
    interactive: bool
    """Whether somebody sits before it: then there are prompt signs, and Ctrl-C stops an answer rather than all."""

    @classmethod
    def standard(cls) -> Terminal:
        """Standard input and output; notes go to standard error, so that a pipe gets the answers only."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  (gives `input` its line editing and its own history)
        return cls(
            read=lambda sign: input(sign) if interactive else input(),
            write=lambda text: print(text, end="", flush=True),
            note=lambda line: print(line, file=sys.stderr, flush=True),
            interactive=interactive,
        )


def chat(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    compare: bool = False,
    prompts: Sequence[str] | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    load_in_4bit: bool | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    stream_base: bool = False,
    embedding_on_host: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    terminal: Terminal | None = None,
) -> None:
    """Answer what is typed, or each line of standard input, or `prompts`, with one model.

    Args:
        model: an NF4 checkpoint, a 16-bit model directory (a merged one too) or a Hub id.
        adapter: trained on `model`. If its directory holds a tokenizer with a chat template, as `train` leaves one
            there, that is used: the adapter has learned to answer in it.
        compare: answer each question twice, without and with the adapter.
        prompts: answer these, in one conversation, and return; they are never taken for commands.
        system: the system message.
        temperature: 0 for the likeliest token each time.
        load_in_4bit: quantize a 16-bit `model` as it loads; by default only if the adapter was trained on NF4.
        dtype: of the arithmetic; see `arithmetic.usual_dtype`.
        allow_other_base: put the adapter on other weights than it was trained on, see `kinship`.
        terminal: by default standard input and output.

    Raises:
        ConfigError: an argument is wrong; or, with nobody before the terminal, a question could not be answered (the
            others were).
        CheckpointError: model or adapter is missing, damaged, or they do not belong together.
        DataError: what is read is not UTF-8.
        NumericsError: the model's logits are not finite.
    """
    if compare and adapter is None:
        raise ConfigError("compare needs an adapter: it answers without and with it; give --adapter")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    for text in (*(prompts or ()), system or ""):
        if holds_half_a_pair(text):
            raise DataError(f"{text!r} is not UTF-8 text")
    terminal = terminal or Terminal.standard()
    tokenizer, whose = tokenizer_of(model, adapter, trust_remote_code)
    loaded, weights = load_to_answer(
        model,
        adapter,
        dtype=dtype,
        device=device,
        load_in_4bit=load_in_4bit,
        stream_base=stream_base,
        embedding_on_host=embedding_on_host,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    named = str(model) if adapter is None else f"{model} with {adapter}"
    terminal.note(f"{named}: {weights}, {_arithmetic(loaded)}, {_template(tokenizer, whose)}")
    headings = {"without the adapter": False, "with the adapter": True} if compare else {"": True}
    voices = {
        heading: Conversation(loaded, tokenizer, sampling, system, use_adapter, whose)
        for heading, use_adapter in headings.items()
    }
    if prompts:
        _check_answered(
            [_answer(voices, prompt, f"prompt {number}", terminal) for number, prompt in enumerate(prompts, 1)],
            "prompt",
        )
    else:
        converse(voices, terminal)


def _arithmetic(model: Any) -> str:
    return f"{str(model.config.dtype).removeprefix('torch.')} on {place_of(model)}"


def _template(tokenizer: Any, whose: str) -> str:
    if tokenizer.chat_template:
        return f"the chat template of {whose}"
    return "no chat template, so each text is continued as it stands"


def converse(voices: Mapping[str, Conversation], terminal: Terminal) -> None:
    """Read and answer until the end of the input, `/exit`, or Ctrl-C at the prompt.

    Args:
        voices: by the headings of their answers; each answers every question.

    Raises:
        ConfigError: a question could not be answered, and nobody was there to see it.
        DataError: what is read is not UTF-8.
    """
    answered: list[bool] = []
    if terminal.interactive:
        terminal.note("/help lists the commands")
    while (line := _read(terminal)) is not None:
        command = _COMMAND.fullmatch(line.rstrip())
        if command is None:
            if line.strip():
                name = "" if terminal.interactive else f"question {len(answered) + 1}"
                answered.append(_answer(voices, line, name, terminal))
        elif command[1].lower() == "exit":
            break
        else:
            terminal.note(_obey(command[1].lower(), command[2], voices))
    if not terminal.interactive:
        _check_answered(answered, "question")


def _check_answered(answered: Sequence[bool], what: str) -> None:
    """
    Raises:
        ConfigError: not all were.
    """
    missed = [str(number) for number, done in enumerate(answered, 1) if not done]
    if missed:
        which = f"{len(missed)} of {len(answered)} {what}s not answered ({what} {', '.join(missed)})"
        raise ConfigError(f"{which}; the notes above say why")


def _obey(command: str, text: str | None, voices: Mapping[str, Conversation]) -> str:
    """Carry out a command.

    Returns:
        What to say of it.
    """
    if command == "new":
        for voice in voices.values():
            voice.forget()
        return "the conversation is forgotten"
    if command == "system":
        try:
            for voice in voices.values():
                voice.set_system(text)
        except ConfigError as error:
            return str(error)
        return "the system message is set" if text else "there is no system message now"
    return HELP if command == "help" else f"no command /{command}; /help lists them"


def _answer(voices: Mapping[str, Conversation], question: str, name: str, terminal: Terminal) -> bool:
    """Ask every voice.

    Args:
        name: of the question, for a note that it cannot be answered.

    Returns:
        Whether all have answered.
    """
    all_have = True
    for heading, voice in voices.items():
        if heading:
            terminal.write(f"── {heading} ──\n")
        with _remembered_interrupt() if terminal.interactive else nullcontext(lambda: False) as stopped:
            try:
                answer = voice.ask(question, terminal.write, stopped)
            except ConfigError as error:
                terminal.note(f"{name}: {error}" if name else str(error))
                all_have = False
                continue
        terminal.write("\n")
        for line in _remarks(answer):
            terminal.note(line)
    if terminal.interactive:
        terminal.write("\n")
    return all_have


def _remarks(answer: Answer) -> list[str]:
    remarks = []
    if answer.stopped:
        remarks.append("(stopped)")
    if answer.cut:
        remarks.append(f"(cut after {answer.tokens:,} tokens)")
    if answer.forgotten:
        turns = "turn was" if answer.forgotten == 1 else f"{answer.forgotten} turns were"
        remarks.append(f"(the oldest {turns} forgotten: the model takes no more)")
    return remarks


def _read(terminal: Terminal) -> str | None:
    """A question, of one line or of several that end in a backslash; None at the end."""
    lines: list[str] = []
    try:
        while not lines or lines[-1].endswith("\\"):
            lines.append(terminal.read("… " if lines else "> "))
            lines[-1].encode()  # what is not UTF-8 may come as lone surrogates
    except EOFError:
        if terminal.interactive:
            terminal.write("\n")
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
        terminal.write("\n")
        return None
    except UnicodeError:
        raise DataError("what was read is not UTF-8; convert it") from None
    return "\n".join(line.removesuffix("\\") for line in lines) if lines else None


@contextmanager
def _remembered_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is only remembered, for the caller to ask; the second one is what it always was."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals are the main thread's
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler
    seen: list[int] = []

    def remember(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
