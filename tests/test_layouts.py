"""Which layout data is in, and the last answer of a row, read and put in another's place."""

from __future__ import annotations

from typing import Any

import pytest

from qdora.errors import DataError
from qdora.layouts import last_answer, recognize, with_last_answer

USER, ASSISTANT = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "42."}
ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER, ASSISTANT]}, "messages"),
    ({"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "42."}]}, "sharegpt"),
    ({"instruction": "Count.", "input": "", "output": "42."}, "alpaca"),
    ({"prompt": "How many? ", "completion": "42."}, "prompt/completion"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt/completion"),
]


@pytest.mark.parametrize(("row", "layout"), ROWS)
def test_the_last_answer_can_be_another(row: dict[str, Any], layout: str) -> None:
    assert recognize([row], "data") == layout
    assert last_answer(row, layout, "row 1") == "42."
    other = with_last_answer(row, layout, "43.")
    assert last_answer(other, layout, "row 1") == "43."
    assert last_answer(row, layout, "row 1") == "42."
    assert other.keys() == row.keys()


def test_the_answer_put_there_counts() -> None:
    row = {"messages": [USER, {**ASSISTANT, "weight": 0}]}
    assert with_last_answer(row, "messages", "43.") == {"messages": [USER, {**ASSISTANT, "content": "43."}]}


def test_no_answer() -> None:
    with pytest.raises(DataError, match="row 7: plain text has no question"):
        last_answer({"text": "42."}, "text", "row 7")
    with pytest.raises(DataError, match="row 7: the chat does not end with an answer"):
        last_answer({"messages": [ASSISTANT, USER]}, "messages", "row 7")


def test_columns_that_are_no_layout() -> None:
    with pytest.raises(DataError, match=r"data has the columns a, b, which is no known layout \(messages: messages;"):
        recognize([{"a": 1, "b": 2}], "data")
    with pytest.raises(DataError, match=r"^data: the first row has no columns at all"):
        recognize([{}], "data")
