"""Regular expressions from files that a stranger may have written, matched without giving them all the time there is.

Python's `re` may try every way to part a name into pieces: `(\\w+\\.?)*!` takes longer than a life over forty letters.
PEFT's configs hold such expressions, and so does the list of modules that a quantized model keeps in 16 bits. Ours are
matched by the package `regex`, which gives up when told to. Those that transformers matches by itself are looked at
beforehand: where nothing repeats a group, and few things repeat at all, there are not many ways to try.
"""

from __future__ import annotations

import re
from functools import cache

import regex

from qdora.errors import ConfigError, shown

__all__ = ["check_pattern", "is_tame", "matches"]

_LONGEST = 10_000
_SECONDS = 0.2
_MOST_REPEATS = 3


def check_pattern(pattern: str) -> None:
    """
    Raises:
        ConfigError: no regular expression, or an absurdly long one.
    """
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        raise ConfigError(f"not a regular expression of at most {_LONGEST:,} characters: {shown(pattern)}")
    try:
        re.compile(pattern)  # what PEFT does with it
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"not a valid regular expression: {shown(pattern)} ({error})") from None


def matches(pattern: str, name: str) -> bool:
    """Whether an expression, for which `check_pattern` has spoken, matches all of a name.

    Raises:
        ConfigError: it could not be told in a fifth of a second.
    """
    try:
        return _compiled(pattern).fullmatch(name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise ConfigError(
            f"the regular expression {shown(pattern)} is still trying to match {name!r} after {_SECONDS:g} s; write "
            "it without a repetition inside a repetition"
        ) from None


def is_tame(pattern: object) -> bool:
    """Whether any engine is done with this expression soon: three repetitions at most, and none of a group."""
    return (
        isinstance(pattern, str)
        and len(pattern) <= _LONGEST
        and len(re.findall(r"[*+{]", pattern)) <= _MOST_REPEATS
        and re.search(r"\)[*+{]", pattern) is None
    )


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)
