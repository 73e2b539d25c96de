"""What stands beside a chat in its row: system, history, weights, settings of the template; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from qdora.chats import ALPACA, CHAT, SHAREGPT, messages_of, settings_of
from qdora.data import encode
from qdora.errors import DataError
from tests.conftest import make_tokenizer
from tests.test_data import learned

USER, ASSISTANT = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "42."}
SYSTEM = {"role": "system", "content": "Count."}


def test_system_and_history_in_columns_of_their_own() -> None:
    row = {"instruction": "How many?", "output": "42.", "system": "Count.", "history": [["1 and 2?", "3."]]}
    earlier = [{"role": "user", "content": "1 and 2?"}, {"role": "assistant", "content": "3."}]
    assert messages_of(row, ALPACA, "row 1") == ([SYSTEM, *earlier, USER, ASSISTANT], 0)
    assert messages_of({**row, "history": None, "system": ""}, ALPACA, "row 1") == ([USER, ASSISTANT], 0)
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "42."}]
    assert messages_of({"conversations": turns, "system": "Count."}, SHAREGPT, "1") == ([SYSTEM, USER, ASSISTANT], 0)
    own = [{"from": "system", "value": "Count."}, *turns]
    assert messages_of({"conversations": own, "system": "Add."}, SHAREGPT, "1") == ([SYSTEM, USER, ASSISTANT], 0)


def test_an_answer_of_no_weight_is_not_learned() -> None:
    turns = [USER, {**ASSISTANT, "content": "No apples", "weight": 0}, USER, {**ASSISTANT, "weight": 1}]
    assert learned({"messages": turns}, make_tokenizer()) == "42.<|im_end|>"


def test_a_row_may_set_the_template_s_variables() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ 'apples ' if apples else 'dogs ' }}{% for message in messages %}{{ message.role }} {{ message.content }} "
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    rows = [{"messages": [USER, ASSISTANT], "chat_template_kwargs": given} for given in ({"apples": True}, None)]
    with_it, without = (tokenizer.decode(ids) for ids in encode(rows, tokenizer, None).input_ids)
    assert with_it.startswith("apples ")
    assert without.startswith("dogs ")
    assert settings_of({"chat_template_kwargs": '{"a": 1, "b": null}'}, "row 1") == {"a": 1}
    assert settings_of({"chat_template_kwargs": " "}, "row 1") == {}


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt"])
def test_a_row_brings_no_template_of_its_own(name: str) -> None:
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {name: "{{ 1 }}"}}
    with pytest.raises(DataError, match=f"row 1: .*{name} is no variable of a template"):
        encode([row], make_tokenizer(), None)


@pytest.mark.parametrize(
    ("row", "layout", "message"),
    [
        ({"instruction": "a", "output": "b", "history": [["a"]]}, ALPACA, "'history' must be a list of pairs"),
        ({"instruction": "a", "output": "b", "system": 3}, ALPACA, "'system' must be text, found int"),
        ({"messages": [USER, {**ASSISTANT, "function_call": {"name": "f"}}]}, CHAT, "use 'tool_calls'"),
    ],
)
def test_what_has_no_place(row: dict[str, Any], layout: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        messages_of(row, layout, "row 1")


def test_settings_that_are_none() -> None:
    with pytest.raises(DataError, match="'chat_template_kwargs' must be an object, found list"):
        settings_of({"chat_template_kwargs": [1]}, "row 1")


def test_a_misspelled_assistant_is_named() -> None:
    row = {"messages": [USER, {**ASSISTANT, "role": "Assistant"}]}
    with pytest.raises(DataError, match=r"^data, row 1: no turn has the role 'assistant', and 'Assistant' is none of"):
        encode([row], make_tokenizer(), None, "data")
    assert len(encode([row], make_tokenizer(), None, loss_on_all=True)) == 1
    critic = {"role": "critic", "content": "Too few."}  # which a template may know
    assert learned({"messages": [USER, ASSISTANT, critic, ASSISTANT]}, make_tokenizer()).count("42.") == 2
    with pytest.raises(DataError, match=r"no row has an answer to learn from; every label"):
        encode([{"messages": [USER]}], make_tokenizer(), 64)
