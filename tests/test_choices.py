"""Multiple choice: which texts are compared, and what counts as right."""

from __future__ import annotations

from typing import Any

import pytest

from qdora import DataError
from qdora.choices import accuracy, choice_rows

PAIR = {"prompt": "2 + 2 =", "completion": " 4", "choices": ["3", " 4", "44"]}


def answers(rows: list[dict[str, Any]], column: str) -> list[Any]:
    return [row[column] for row in rows]


def test_from_a_column() -> None:
    (choice,) = choice_rows([PAIR], "d")
    assert (answers(choice.rows, "completion"), choice.correct) == ([" 3", " 4", " 44"], 1)  # as the answer begins
    assert choice_rows([{"prompt": "a", "completion": "b"}], "d") == []


@pytest.mark.parametrize(
    ("row", "look"),
    [
        (
            {"instruction": "Which?", "output": "the correct answer is answer2"},
            lambda row: row["output"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Which?"},
                    {"role": "assistant", "content": "the correct answer is answer2"},
                ]
            },
            lambda row: row["messages"][-1]["content"],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Which?"},
                    {"from": "gpt", "value": "the correct answer is answer2"},
                ]
            },
            lambda row: row["conversations"][-1]["value"],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Which?"}],
                "completion": [{"role": "assistant", "content": "the correct answer is answer2"}],
            },
            lambda row: row["completion"][-1]["content"],
        ),
    ],
)
def test_from_words_in_every_layout(row: dict[str, Any], look: Any) -> None:
    (choice,) = choice_rows([row], "d", ["answer1", "answer2", "answer22"])
    assert [look(r) for r in choice.rows] == [f"the correct answer is answer{i}" for i in (1, 2, 22)]
    assert choice.correct == 1
    assert look(row) == "the correct answer is answer2"


def test_the_most_likely_is_the_model_s_choice() -> None:
    choices = choice_rows([PAIR, PAIR], "d")
    found = accuracy(choices, [[-2.0, -1.0, -3.0], [-1.0, -2.0, -1.5]])
    assert (found.by_likelihood, found.by_character, found.questions) == (0.5, 0.5, 2)
    assert accuracy(choices, [[-9.0, -1.5, -2.0]] * 2).by_likelihood == 1
    assert accuracy(choices, [[-9.0, -1.5, -2.0]] * 2).by_character == 0  # two characters share -2.0


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"text": "a", "choices": ["a", "b"]}, [], "row 1: plain text has no question"),
        ({**PAIR, "choices": ["3"]}, [], "must be a list of at least two texts"),
        ({**PAIR, "choices": ["3", "5"]}, [], "is 0 times among the choices"),
        (PAIR, ["yes", "no"], "holds 0 of the choices yes, no"),
        (PAIR, ["4"], "one word, '4', leaves nothing to choose"),
        ({**PAIR, "completion": "yes or no"}, ["yes", "no"], "holds 2 of the choices"),
        ({"messages": [{"role": "user", "content": "a"}], "choices": ["a", "b"]}, [], "does not end with an answer"),
    ],
)
def test_mistakes(row: dict[str, Any], words: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        choice_rows([row], "d", words)
