"""Questions out of encoded rows, and answers in batches that are those of one row at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qdora
from qdora.answers import Answered, Question, _batches, answer, answerable, count_matches, questions
from qdora.data import encode
from tests.conftest import make_model, make_tokenizer


def chat(*turns: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def test_the_last_answer_is_asked_for() -> None:
    tokenizer = make_tokenizer()
    data = encode([chat("12?", "12 apples", "30?", "30 dogs"), chat("1?", "one")], tokenizer, None)
    first, second = questions(data)
    assert tokenizer.decode(second.expected) == "one<|im_end|>"
    assert tokenizer.decode(first.prompt).endswith("<|im_start|>assistant\n")
    assert first.expected == tokenizer("30 dogs<|im_end|>").input_ids


def test_plain_text_asks_nothing() -> None:
    tokenizer = make_tokenizer()
    assert questions(encode([{"text": "The quick brown fox"}], tokenizer, None)) == []


@pytest.mark.parametrize("joined", [False, True])
def test_an_answer_with_nothing_before_it_is_asked_by_nothing(joined: bool) -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "", "completion": "12 apples"}, {"prompt": "1", "completion": " apples"}]
    (question,) = questions(encode(rows, tokenizer, None, joined=joined))
    assert tokenizer.decode(question.prompt) == "1"


def test_batches_answer_as_single_rows_do(tmp_path: Path) -> None:
    directory = make_model(tmp_path)
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps({**config, "do_sample": True, "temperature": 5.0}))
    model = qdora.load_model(directory, load_in_4bit=False, dtype="float32").train()
    tokenizer = qdora.load_tokenizer(directory)
    texts = ["The quick", "Question: How many apples are 12 and 30? Answer:", "count", "user and the assistant"]
    asked = [Question(tokenizer(text).input_ids, [9] * 6) for text in texts]
    together = [each.given for each in answer(model, tokenizer, asked, batch_size=3)]
    assert model.training
    assert together == [answer(model, tokenizer, [question])[0].given for question in asked]
    ids = torch.tensor([asked[1].prompt])
    tokens = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
    alone = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert together[1] == alone.strip()


@pytest.mark.parametrize(("answers", "right"), [(["a", "b"], 2), (["a", "B"], 1), (["", "b."], 0)])
def test_matches(answers: list[str], right: int) -> None:
    assert count_matches(map(Answered, ["a", "b"], answers)) == right


def test_what_a_model_has_room_for_is_answered(tmp_path: Path) -> None:
    fits, too_long = Question([1] * 80, [1] * 8), Question([1] * 81, [1] * 8)
    assert answerable([fits, too_long], 96) == [fits]
    assert answerable([fits, too_long], None) == [fits, too_long]
    model = qdora.load_model(make_model(tmp_path), load_in_4bit=False, dtype="float32")
    model.config.max_position_embeddings = 96
    assert len(answer(model, make_tokenizer(), [fits])) == 1


def test_a_batch_has_room_for_its_longest_answer() -> None:
    asked = [Question([1] * length, [1] * tokens) for length, tokens in ((2, 90), (70, 5), (73, 4), (100, 3), (3, 3))]
    batches = _batches(asked, 8, 128)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    for batch in batches:
        longest, most = max(len(asked[i].prompt) for i in batch), max(len(asked[i].expected) for i in batch)
        assert longest + most + 8 <= 128
    assert len(batches) == 2
    assert _batches(asked, 2, None) == [[0, 4], [1, 2], [3]]


def test_an_answer_may_be_a_special_token(tmp_path: Path) -> None:
    """Left out of both texts, any two of them would match."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<yes>", "<no>"], special_tokens=True)
    model = qdora.load_model(make_model(tmp_path), load_in_4bit=False, dtype="float32")
    model.resize_token_embeddings(len(tokenizer))
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<yes>", "<no>", "<|im_end|>")}
    asked = questions(encode([chat("?", "<yes>"), chat("?", "<no>")], tokenizer, None))
    says_no = iter([ids["<no>"], ids["<|im_end|>"]] * 2)

    def only(*_: Any) -> torch.Tensor:
        token = next(says_no)
        return torch.full((1, 1, len(tokenizer)), -9.0).index_fill(2, torch.tensor([token]), 9.0)

    model.lm_head.register_forward_hook(only)
    answers = [answer(model, tokenizer, [question])[0] for question in asked]
    assert answers == [Answered("<yes>", "<no>"), Answered("<no>", "<no>")]
    assert count_matches(answers) == 1
