"""Layouts, masks and truncation, checked by decoding what carries loss."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, processors

from qdora.data import IGNORED, encode, marked
from qdora.errors import DataError
from qdora.layouts import recognize
from tests.conftest import make_tokenizer

USER, ASSISTANT = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "42 apples."}


def learned(row: dict[str, Any], tokenizer: Any, **options: Any) -> str:
    encoded = encode([row], tokenizer, options.pop("max_length", None), **options)
    assert len(encoded.input_ids[0]) == len(encoded.labels[0])
    kept = [i for i, label in zip(encoded.input_ids[0], encoded.labels[0], strict=True) if label != IGNORED]
    assert kept == [label for label in encoded.labels[0] if label != IGNORED]
    return tokenizer.decode(kept)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        (
            {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "42 apples."}]},
            "sharegpt",
        ),
        ({"instruction": "How many?", "output": "42 apples."}, "alpaca"),
        ({"instruction": "How", "input": "many?", "output": "42 apples."}, "alpaca"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt/completion"),
    ],
)
def test_chats_learn_the_answer_and_its_end(row: dict[str, Any], layout: str, tokenizer: Any) -> None:
    assert recognize([row], "data") == layout
    assert learned(row, tokenizer) == "42 apples.<|im_end|>"
    whole = tokenizer.decode(encode([row], tokenizer, None).input_ids[0])
    assert whole.startswith("<|im_start|>user\nHow")
    assert whole.rstrip().endswith("<|im_start|>assistant\n42 apples.<|im_end|>")


def test_every_assistant_turn_is_learned_and_no_other(tokenizer: Any) -> None:
    system = {"role": "system", "content": "Count the apples."}
    turns = [system, USER, ASSISTANT, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Quite."}]
    assert learned({"messages": turns}, tokenizer) == "42 apples.<|im_end|>Quite.<|im_end|>"
    completion_only = {"prompt": turns[:4], "completion": turns[4:]}
    assert learned(completion_only, tokenizer) == "Quite.<|im_end|>"


def test_prompt_and_completion_stand_as_they_are(tokenizer: Any) -> None:
    row = {"prompt": "Question: 12?\nAnswer:", "completion": " 42"}
    assert learned(row, tokenizer) == " 42<|im_end|>"
    assert tokenizer.decode(encode([row], tokenizer, None).input_ids[0]) == "Question: 12?\nAnswer: 42<|im_end|>"


def test_a_token_across_the_border_belongs_to_the_answer(tokenizer: Any) -> None:
    assert learned({"prompt": "The quick brown fo", "completion": "x jumps"}, tokenizer).endswith("x jumps<|im_end|>")


def test_text_and_loss_on_all_learn_everything_that_a_token_comes_before(tokenizer: Any) -> None:
    assert learned({"text": "The lazy dog"}, tokenizer) == " lazy dog<|im_end|>"
    row = {"prompt": "How many?", "completion": " 42"}
    assert learned(row, tokenizer, loss_on_all=True) == "w many? 42<|im_end|>"


def test_cut_and_dropped_rows_are_counted(tokenizer: Any) -> None:
    short = {"prompt": "A", "completion": " 1"}
    long_answer = {"prompt": "A", "completion": " 1" * 40}
    long_prompt = {"prompt": "A b" * 40, "completion": " 1"}
    encoded = encode([short, long_answer, long_prompt], tokenizer, 20)
    assert (len(encoded), encoded.cut, encoded.dropped) == (2, 1, 1)
    assert "1 answers cut" in str(encoded)
    assert "1 rows without an answer" in str(encoded)
    assert encoded.answer_tokens == sum(label != IGNORED for row in encoded.labels for label in row)
    with pytest.raises(DataError, match="every label would be masked"):
        encode([long_prompt], tokenizer, 20)
    with pytest.raises(DataError, match="no row has an answer"):
        encode([{"messages": [USER]}], tokenizer, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "row 17: the field 'completion' is missing"),
        ({"prompt": "x", "completion": 3}, "row 17: the field 'completion' must be text, found int"),
        ({"prompt": "x", "completion": "\ud800"}, "row 17: the field 'completion' holds half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str, tokenizer: Any) -> None:
    rows = [{"prompt": "x", "completion": "y"}] * 16 + [row]
    with pytest.raises(DataError, match=message):
        encode(rows, tokenizer, None)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, "'messages' is missing"),
        ([], "list of messages"),
        (["hello"], "list of messages"),
        ([{"role": "user"}], "'content' is missing"),
        ([{"role": "user", "content": ["part"]}], "must be text, found list"),
    ],
)
def test_bad_messages_are_named(turns: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        encode([{"messages": turns}], tokenizer, None)


def test_an_unknown_speaker_and_a_missing_template(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="unknown speaker 'alien'"):
        encode([{"conversations": [{"from": "alien", "value": "x"}]}], tokenizer, None)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(DataError, match="no chat template"):
            encode([{"messages": [USER, ASSISTANT]}], tokenizer, None)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match="roles must alternate"):
            encode([{"messages": [USER, ASSISTANT]}], tokenizer, None)
        tokenizer.chat_template = "{% if add_generation_prompt %}other{% endif %}{{ messages | length }}"
        with pytest.raises(DataError, match="asks for the answer with 'other1' and renders it otherwise, which hides"):
            encode([{"messages": [USER, ASSISTANT]}], tokenizer, None)
    finally:
        tokenizer.chat_template = template


def test_an_unknown_layout_lists_the_known(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"columns question, answer, which is no known layout .*alpaca"):
        encode([{"question": "x", "answer": "y"}], tokenizer, None)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}(hm) {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}tools: {{ tools | map(attribute='name') | join }}\n{% endif %}{% for m in messages %}"
    "{{ m['role'] }}:{% for call in m.get('tool_calls', []) %}call {{ call['name'] }};{% endfor %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def with_template(tokenizer: Any) -> Iterator[Any]:
    kept = tokenizer.chat_template
    yield lambda template: setattr(tokenizer, "chat_template", template)
    tokenizer.chat_template = kept


def test_turns_that_the_template_rewrites_are_counted(tokenizer: Any, with_template: Any) -> None:
    with_template(THINKING)
    row = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    assert learned(row, tokenizer) == "(hm) 42 apples.<|im_end|>"
    encoded = encode([row], tokenizer, None)
    assert encoded.hidden == 1
    assert "1 earlier answers without loss" in str(encoded)
    assert learned(row, tokenizer, loss_on_all=True).startswith("user\nHow many?")


def test_loss_on_all_needs_no_place_for_the_answer(tokenizer: Any, with_template: Any) -> None:
    with_template("{% if add_generation_prompt %}other{% endif %}{{ messages | length }} in all")
    assert learned({"messages": [USER, ASSISTANT]}, tokenizer, loss_on_all=True) == " in all<|im_end|>"


@pytest.mark.parametrize("tools", [[{"name": "count"}], '[{"name": "count"}]'])
def test_tools_and_their_calls_reach_the_template(tools: Any, tokenizer: Any, with_template: Any) -> None:
    with_template(TOOLS)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "count"}], "reasoning_content": None}
    row = {"messages": [USER, call, {"role": "tool", "content": "42"}, ASSISTANT], "tools": tools}
    assert learned(row, tokenizer) == "call count;<|im_end|>42 apples.<|im_end|>"
    assert tokenizer.decode(encode([row], tokenizer, None).input_ids[0]).startswith("tools: count\nuser:How many?")
    with pytest.raises(DataError, match="'tools' must be a list, found int"):
        encode([{**row, "tools": 3}], tokenizer, None)


def test_the_end_that_the_tokenizer_adds_is_learned() -> None:
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    encoded = encode([{"prompt": "How many?", "completion": " 42"}], tokenizer, None)
    assert encoded.input_ids[0].count(end) == 1
    assert encoded.labels[0][-1] == end


def test_an_answer_with_nothing_before_it_is_no_answer(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="every label would be masked"):
        encode([{"text": "The lazy dog"}], tokenizer, 1)


@pytest.mark.parametrize("row", [{"text": "The lazy dog"}, {"prompt": "The lazy", "completion": " dog"}])
def test_the_first_token_carries_loss_only_where_another_row_predicts_it(row: dict[str, str], tokenizer: Any) -> None:
    apart, joined = (encode([row], tokenizer, None, loss_on_all=True, joined=each) for each in (False, True))
    ids = apart.input_ids[0]
    assert (apart.labels, joined.labels) == ([[IGNORED, *ids[1:]]], [ids])
    assert (apart.answer_tokens, joined.answer_tokens) == (len(ids) - 1, len(ids))
    assert marked(ids, apart.labels[0], tokenizer) == "The⟦ lazy dog<|im_end|>⟧"


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARK = re.compile(r"<[|a-zA-Z_/][^<>\s{}'\"]*>")
CHAT = [USER, ASSISTANT, {"role": "user", "content": "And pears?"}, {"role": "assistant", "content": "7 pears."}]


def template_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def speaking(name: str) -> Any:
    """The tiny tokenizer with a real model's chat template, whose marks are tokens as they are there."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(sorted(set(MARK.findall(template_of(name)))), special_tokens=True)
    tokenizer.chat_template = template_of(name)
    return tokenizer


def marked_parts(text: str) -> list[str]:
    return [part.rstrip() for part in re.findall("⟦(.*?)⟧", text, re.S)]


@pytest.mark.parametrize(
    "name",
    ["cohere", "cohere2", "gemma", "gemma3", "gptoss", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5"],
)
def test_what_real_templates_teach_is_what_trl_s_own_for_training_mark(name: str) -> None:
    tokenizer = speaking(name)
    theirs = tokenizer.apply_chat_template(
        CHAT, chat_template=template_of(f"{name}_training"), return_assistant_tokens_mask=True, return_dict=True
    )
    marks = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    expected = marked_parts(marked(theirs["input_ids"], [i if mark else IGNORED for i, mark in marks], tokenizer))
    data = encode([{"messages": CHAT}], tokenizer, None)
    found = marked_parts(marked(data.input_ids[0], data.labels[0], tokenizer))
    assert len(found) == len(expected) == 2
    # TRL counts the role among the answer where the request for it does not give it whole.
    assert all(theirs.strip().endswith(ours) and ours for theirs, ours in zip(expected, found, strict=True))
    assert (data.hidden, data.ended) == (0, 0)


def test_a_template_that_wants_words_in_lists_is_refused() -> None:
    with pytest.raises(DataError, match="leaves the answer's words out"):
        encode([{"messages": CHAT}], speaking("smolvlm"), None)


def test_an_answer_that_nothing_asks_for_is_not_learned() -> None:
    greeting = {"messages": [{"role": "assistant", "content": "Hi"}, *CHAT[:2]]}
    for name in ("qwen2_5", "llama3"):
        data = encode([greeting], speaking(name), None)
        assert marked_parts(marked(data.input_ids[0], data.labels[0], speaking(name)))[0].startswith("42 apples.<|")
        assert data.hidden == 1
    with pytest.raises(DataError, match="no row has an answer"):
        encode([{"messages": greeting["messages"][:1]}], make_tokenizer(), None)


@pytest.mark.parametrize("name", ["gemma", "qwen2_5", "phi3"])
def test_what_follows_the_token_that_ends_an_answer_makes_no_other_end(name: str) -> None:
    tokenizer = speaking(name)
    data = encode([{"messages": CHAT}], tokenizer, None, loss_on_all=True)
    assert (data.ended, data.labels) == (0, [[IGNORED, *ids[1:]] for ids in data.input_ids])
    assert tokenizer.decode(data.input_ids[0]) == tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("special", [True, False])
def test_an_answer_may_be_a_token_that_was_added(special: bool, with_template: Any) -> None:
    tokenizer = speaking("qwen2_5")
    tokenizer.add_tokens(["<yes>"], special_tokens=special)
    row = {"messages": [USER, {"role": "assistant", "content": "<yes>"}]}
    assert learned(row, tokenizer).strip() == "<yes><|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "(message.content | upper)")
    tokenizer.add_tokens(["<YES>"], special_tokens=special)
    assert learned(row, tokenizer).strip() == "<YES><|im_end|>"


OPEN = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@pytest.mark.parametrize("loss_on_all", [True, False])
def test_an_answer_without_an_end_is_given_one(loss_on_all: bool, tokenizer: Any, with_template: Any) -> None:
    with_template(OPEN)
    data = encode([{"messages": CHAT}], tokenizer, None, loss_on_all=loss_on_all)
    assert tokenizer.decode(data.input_ids[0]).endswith("7 pears." + ("\n\n" if loss_on_all else "") + "<|im_end|>")
    assert data.labels[0][-1] == tokenizer.eos_token_id
    assert data.ended == 1
    assert "1 answers ended by EOS" in str(data)
    asking = encode([{"messages": [*CHAT, USER]}], tokenizer, None, loss_on_all=loss_on_all)
    assert asking.ended == 0
    assert tokenizer.eos_token_id not in asking.input_ids[0]


@pytest.mark.parametrize("row", [{"text": "<s>hello"}, {"prompt": "<s>hel", "completion": "lo"}])
def test_a_bos_that_is_there_is_enough(row: dict[str, str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for given in (row, {key: value.removeprefix("<s>") for key, value in row.items()}):
        ids = encode([given], tokenizer, None).input_ids[0]
        assert tokenizer.decode(ids) == "<s>hello<|im_end|>"


def test_white_space_without_offsets_is_learned() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    code = "\ndef f(x):\n    if x:\n        return 1"
    assert learned({"prompt": "Write f.", "completion": code}, tokenizer) == f"{code}<|im_end|>"
    assert learned({"instruction": "Write f.", "output": code}, tokenizer) == f"{code}<|im_end|>"


def test_a_token_that_swallows_the_space_after_it_is_no_answer(tokenizer: Any) -> None:
    """Phi-3's `<|assistant|>` does; its offsets reach to the next word."""
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)])
    row = {"prompt": "How many?<|assistant|>", "completion": " 42 apples"}
    assert learned(row, tokenizer) == "42 apples<|im_end|>"
    tokenizer.add_tokens([AddedToken("<yes>", lstrip=True, special=True)])
    assert learned({"prompt": "How many?", "completion": " <yes>"}, tokenizer).strip() == "<yes><|im_end|>"


def test_max_length_is_blamed_only_for_what_it_cut(tokenizer: Any) -> None:
    for row, blamed in (({"prompt": "Question: 12?", "completion": " 42"}, " within max_length=3"), ({"text": ""}, "")):
        with pytest.raises(DataError, match=rf"^data: no row has an answer to learn from{blamed}; every label"):
            encode([row], tokenizer, 3, "data")
