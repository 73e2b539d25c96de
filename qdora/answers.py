"""Greedy answers to the questions in a data set, and how many are word for word the ones that stand there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from qdora.architecture import context_of
from qdora.arithmetic import place_of
from qdora.chats import TEXT
from qdora.data import EncodedData, last_answer_in
from qdora.generation import RefuseNaN, end_tokens, generating_by

__all__ = ["Answered", "Question", "answer", "answerable", "count_matches", "questions"]

# Room for an answer that begins with a space or a newline too many.
_SPARE_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """What stands before a row's last answer, and that answer."""

    prompt: list[int]
    expected: list[int]
    """The answer's tokens, with what ends it."""


@dataclass(frozen=True)
class Answered:
    """A question's answer as it should be and as the model gave it, up to what ends them."""

    expected: str
    given: str

    @property
    def matches(self) -> bool:
        """Word for word, but for white space around them."""
        return self.expected == self.given


def questions(data: EncodedData) -> list[Question]:
    """The rows' last answers as questions; plain text has none."""
    if data.layout == TEXT:
        return []
    found = []
    for ids, labels, begun in zip(data.input_ids, data.labels, data.begins_in_answer, strict=True):
        first, end = last_answer_in(labels)
        if first > begun:  # an answer's first token is no question to the others
            found.append(Question(ids[:first], ids[first:end]))
    return found


def answerable(asked: Iterable[Question], limit: int | None) -> list[Question]:
    """Those that, with their answers, fit into the `limit` tokens that a model takes."""
    return [question for question in asked if limit is None or _tokens(question) <= limit]


def _tokens(question: Question) -> int:
    return len(question.prompt) + len(question.expected) + _SPARE_TOKENS


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Answered]:
    """The model's greedy answer to each question, stripped of what surrounds it.

    Args:
        model: with `generate`; it is put into eval mode and back.
        asked: each `answerable` by the model.
        progress: wraps the list of batches, such as tqdm.
    """
    batches = _batches(asked, batch_size, context_of(model.config))
    answers: dict[int, Answered] = {}
    was_training = model.training
    model.eval()
    try:
        for indices in progress(batches):
            answers.update(zip(indices, _batch(model, tokenizer, [asked[i] for i in indices]), strict=True))
    finally:
        model.train(was_training)
    return [answers[i] for i in range(len(asked))]


def count_matches(answers: Iterable[Answered]) -> int:
    """How many answers are the expected ones."""
    return sum(answer.matches for answer in answers)


def _batches(asked: Sequence[Question], batch_size: int, limit: int | None) -> list[list[int]]:
    """Questions of like length, as many at once as the context has room for: all are answered to the longest's end."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(asked)), key=lambda i: len(asked[i].prompt)):
        tokens = max(tokens, len(asked[i].expected))
        full = not batches or len(batches[-1]) == batch_size
        if full or (limit is not None and len(asked[i].prompt) + tokens + _SPARE_TOKENS > limit):
            batches.append([])
            tokens = len(asked[i].expected)
        batches[-1].append(i)
    return batches


def _batch(model: Any, tokenizer: Any, asked: Sequence[Question]) -> list[Answered]:
    length = max(len(question.prompt) for question in asked)
    # What stands before a shorter prompt is masked, so any token does.
    ids = torch.full((len(asked), length), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(asked):
        ids[row, length - len(question.prompt) :] = torch.tensor(question.prompt)
        mask[row, length - len(question.prompt) :] = 1
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max(len(question.expected) for question in asked) + _SPARE_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
    )
    ids, mask = ids.to(place_of(model)), mask.to(place_of(model))
    with generating_by(model, config):
        refuse = LogitsProcessorList([RefuseNaN()])
        tokens = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=refuse)
    given = tokens[:, length:].tolist()
    return [
        Answered(_text(question.expected, tokenizer, ends), _text(answer, tokenizer, ends))
        for question, answer in zip(asked, given, strict=True)
    ]


def _text(tokens: Sequence[int], tokenizer: Any, ends: Sequence[int]) -> str:
    """Up to what ends it. Special tokens within stay: an answer may be one, and a tool call begins with one."""
    own = list(takewhile(lambda token: token not in ends, tokens))
    text: str = tokenizer.decode(own, skip_special_tokens=False)
    return text.strip()
