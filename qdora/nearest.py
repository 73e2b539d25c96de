"""The valid name that was probably meant, and flags in their one spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = ["did_you_mean", "nearest", "spelled"]

_ALIKE = 0.6


def nearest(name: str, known: Iterable[str], others: Mapping[str, str] | None = None) -> str | None:
    """The known name that is most like this one; None if none is.

    Args:
        others: what people may know a name by from elsewhere → the name here.
    """
    if others and name in others:
        return others[name]

    def likeness(candidate: str) -> float:
        # The beginning counts too: `modle` is near `model_name_or_path`.
        heads = (candidate, candidate[: len(name)])
        whole, head = (difflib.SequenceMatcher(None, name.lower(), text.lower()).ratio() for text in heads)
        return max(whole, 0.9 * head)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= _ALIKE else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error's sentence: the nearest name as a question, or nothing."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near}?"


def spelled(flag: str) -> str:
    """`--max-steps=3` as `--max_steps=3`; what is no flag as it is."""
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
