"""Chat templates, which are programs: rendered within bounds of time and memory.

transformers runs them in Jinja's sandbox, out of which no way to files, processes or Python's insides is known. What
the sandbox does not bound is work: two loops in one another run for hours, and a text that doubles sixty times has more
letters than there is memory. So a timer ends what takes too long, and the address space may grow so much meanwhile.

Neither reaches everywhere. Timers are the main thread's, so in other threads there is none; limits on memory exist on
Unix alone; and one operation on numbers of millions of digits does not look at any timer. `**`, by which a few letters
make such a number, is refused; a loop that multiplies may still get there.
"""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["render"]

_SECONDS = 5.0
_BYTES = 2**29


def render(
    tokenizer: Any,
    messages: Sequence[Any],
    tools: list[Any] | None = None,
    ask: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Messages as text, through the tokenizer's chat template.

    Args:
        tools: the functions that the model may call.
        ask: up to where an answer begins.
        settings: variables of the template, such as `enable_thinking`.

    Raises:
        Exception: jinja raises its own errors, and templates raise what they like. Of ours: TimeoutError, MemoryError,
            ValueError.
    """
    if _raises_to_powers(tokenizer.chat_template):
        raise ValueError("it raises numbers to powers, which no chat needs and which may never end")
    # Among them is another template, which nobody would have looked at.
    if taken := sorted((settings or {}).keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys()):
        raise ValueError(f"{taken[0]} is no variable of a template, but an argument of what renders it")
    with _limited_time(), _limited_memory():
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=ask, **(settings or {})
        )
        return text


def _raises_to_powers(template: Any) -> bool:
    """`**` as an operator, rather than before a mapping that is handed on; in any template, if there are several."""
    if isinstance(template, dict):
        return any(map(_raises_to_powers, template.values()))
    if not isinstance(template, str) or "**" not in template:
        return False
    from jinja2 import Environment

    before = ""
    for _, kind, token in Environment().lex(template):
        if kind == "operator" and token == "**" and before not in ("(", ","):
            return True
        before = before if kind == "whitespace" else token
    return False


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> NoReturn:
        raise TimeoutError(f"it was not done after {_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        import resource

        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield  # no such limit here
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    wanted = in_use + _BYTES
    bounded = limits[0] == resource.RLIM_INFINITY or wanted < limits[0]
    if bounded:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it asks for more than {_BYTES // 2**20} MiB") from None
    finally:
        if bounded:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_AS, limits)
