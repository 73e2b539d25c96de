"""Tool calls reach the model as JSON, whichever way the data writes them, or the chat is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qdora.data import encode, marked
from qdora.errors import DataError
from qdora.toolcalls import calls_that_fit, check_calls, leaves_tools_out
from tests.conftest import make_tokenizer
from tests.test_data import marked_parts, speaking

USER = {"role": "user", "content": "How many?"}
ARGUMENTS = {"fruit": "apples", "ripe": True}
TOOL = {"type": "function", "function": {"name": "count", "description": "Count.", "parameters": {}}}


def chat(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "count", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}


def taught(row: dict[str, Any], tokenizer: Any) -> str:
    data = encode([row], tokenizer, None)
    (part,) = marked_parts(marked(data.input_ids[0], data.labels[0], tokenizer))
    return part


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_5_nothink", "llama3_1", "llama3_2", "glm4moe"])
def test_a_mapping_and_its_text_teach_the_same(name: str) -> None:
    tokenizer = speaking(name)
    as_mapping = taught(chat(ARGUMENTS), tokenizer)
    assert as_mapping == taught(chat(json.dumps(ARGUMENTS)), tokenizer)
    assert "count" in as_mapping
    assert "apples" in as_mapping
    assert '\\"' not in as_mapping  # JSON within JSON
    assert "True" not in as_mapping or name == "qwen3_5_nothink"  # which writes values as Python does


def test_what_is_no_mapping_stays_text() -> None:
    for arguments in ("apples", "[1]", "{", ""):
        messages = chat(arguments)["messages"]
        assert calls_that_fit(messages, None, lambda messages, _: json.dumps(messages)) == messages


def test_calls_in_any_form_of_the_list() -> None:
    def render(messages: list[Any], _: Any) -> str:
        return str(messages)  # as Python writes it: such a template is given text

    odd = [USER, {"role": "assistant", "tool_calls": [7, {"name": "x"}, {"name": "y", "arguments": {"a": "b"}}]}]
    (_, answer) = calls_that_fit(odd, None, render)
    assert answer["tool_calls"] == [7, {"name": "x"}, {"name": "y", "arguments": '{"a": "b"}'}]
    assert odd[1]["tool_calls"][2]["arguments"] == {"a": "b"}  # type: ignore[index]
    strange = [USER, {"role": "assistant", "tool_calls": "call"}]
    assert calls_that_fit(strange, None, render) == strange


def test_a_template_without_a_place_for_them_is_refused() -> None:
    for tokenizer in (make_tokenizer(), speaking("gemma")):
        with pytest.raises(DataError, match="row 1: the model's chat template has no place for tool calls, "):
            encode([chat(ARGUMENTS)], tokenizer, None)


@pytest.mark.parametrize("loss_on_all", [True, False])
def test_tools_without_a_place_are_told_of(loss_on_all: bool) -> None:
    answer = {"role": "assistant", "content": "42"}
    row = {"messages": [USER, answer], "tools": [TOOL]}
    described = {"messages": [{"role": "user", "content": "You may count."}, answer], "tools": [TOOL["function"]]}
    for tokenizer in (make_tokenizer(), speaking("gemma")):
        data = encode([row, described, {"messages": [USER, answer]}], tokenizer, None, loss_on_all=loss_on_all)
        assert "; the tools of 1 rows left out, for the chat template has no place for them" in str(data)
        assert data.input_ids[0] == data.input_ids[2]
        assert encode([{**row, "tools": [{"type": "search"}]}], tokenizer, None).without_tools == 1
    kept = encode([row], speaking("qwen2_5"), None, loss_on_all=loss_on_all)
    assert (kept.without_tools, "left out" in str(kept)) == (0, False)


def test_a_chat_without_any_is_rendered_no_more_often() -> None:
    def render(*_: Any) -> str:
        raise AssertionError

    check_calls([USER], None, render, "row 1")
    assert not leaves_tools_out("", [USER], None, render)
    assert calls_that_fit([USER], None, render) == [USER]


def test_an_empty_list_is_no_call() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "42", "tool_calls": []}]}
    for name in ("llama3_2", "lfm2_2_5", "gptoss"):
        assert "42" in taught(row, speaking(name))
        assert "tool_call" not in taught(row, speaking(name))


def test_half_of_a_surrogate_pair_in_a_call() -> None:
    with pytest.raises(DataError, match="row 1: the chat holds half of a surrogate pair"):
        encode([chat({"fruit": "\ud83d"})], speaking("qwen2_5"), None)
