"""Multiple choice by likelihood: of several answers to a question, the model's is the one it finds most likely.

The choices stand in the data, in a column `choices` of each row (texts, the row's own answer among them); or they are
given for all rows alike, as words of which each answer holds exactly one: `answer1 answer2 answer3` for an answer such
as "the correct answer is answer2".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdora.errors import DataError
from qdora.layouts import last_answer, recognize, with_last_answer
from qdora.rows import Row

__all__ = ["Accuracy", "Choice", "accuracy", "choice_rows"]


@dataclass(frozen=True)
class Choice:
    """One row as a question of multiple choice."""

    rows: list[Row]
    """The row with each of the choices in its answer's place."""
    texts: list[str]
    correct: int


@dataclass(frozen=True)
class Accuracy:
    """How often the right answer was the most likely one."""

    by_likelihood: float
    by_character: float
    """Of the likelihoods divided by the answers' lengths in characters, which does not favour short answers. The token
    that ends an answer counts among its likelihoods; lm-eval's `acc_norm` leaves it out."""
    questions: int


def choice_rows(rows: Sequence[Row], source: str | Path, words: Sequence[str] = ()) -> list[Choice]:
    """Each row as a question of multiple choice; empty if the data offers no choices and none are given.

    Raises:
        DataError: a row's answer is not one of its choices, or does not hold exactly one of the words.
    """
    layout = recognize(rows, source)
    if len(words) == 1:
        raise DataError(f"one word, {words[0]!r}, leaves nothing to choose; give two or more")
    if not words and "choices" not in rows[0]:
        return []
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{source}, row {number}"
        text = last_answer(row, layout, where)
        texts, correct = _from_words(text, words, where) if words else _from_column(text, row, where)
        found.append(Choice([with_last_answer(row, layout, other) for other in texts], texts, correct))
    return found


def accuracy(choices: Sequence[Choice], likelihoods: Sequence[Sequence[float]]) -> Accuracy:
    """
    Args:
        likelihoods: Σ log p of each choice of each question, with the token that ends it.
    """
    plain = by_character = 0
    for choice, scores in zip(choices, likelihoods, strict=True):
        indices = range(len(scores))
        plain += max(indices, key=lambda i: scores[i]) == choice.correct
        by_character += max(indices, key=lambda i: scores[i] / max(1, len(choice.texts[i].strip()))) == choice.correct
    return Accuracy(plain / len(choices), by_character / len(choices), len(choices))


def _from_words(answer: str, words: Sequence[str], where: str) -> tuple[list[str], int]:
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in words]
    held = [i for i, pattern in enumerate(patterns) if pattern.search(answer)]
    if len(held) != 1:
        raise DataError(f"{where}: the answer {answer!r} holds {len(held)} of the choices {', '.join(words)}, not one")
    correct = held[0]
    return [patterns[correct].sub(lambda _, word=word: word, answer) for word in words], correct  # type: ignore[misc]


def _from_column(answer: str, row: Row, where: str) -> tuple[list[str], int]:
    texts = row.get("choices")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: the field 'choices' must be a list of at least two texts")
    matches = [i for i, text in enumerate(texts) if text.strip() == answer.strip()]
    if len(matches) != 1:
        raise DataError(f"{where}: the answer {answer!r} is {len(matches)} times among the choices, not once")
    # With the answer's own white space, for so the model has learned it.
    lead, trail = answer[: len(answer) - len(answer.lstrip())], answer[len(answer.rstrip()) :]
    return [lead + text.strip() + trail if text.strip() else text for text in texts], matches[0]
