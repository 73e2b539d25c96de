"""Greedy answers to the questions in a data set, and how many are word for word the ones that stand there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from qdora.architecture import context_of
from qdora.data import EncodedData, last_answer_in
from qdora.generation import RefuseNaN, end_tokens, generating_by, place_of

__all__ = ["Question", "answer", "answerable", "count_matches", "questions"]

# Room for an answer that begins with a space or a newline too many.
_SPARE_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """What stands before a row's last answer, and that answer."""

    prompt: list[int]
    expected: str
    tokens: int
    """Of the expected answer, with what ends it."""


def questions(data: EncodedData, tokenizer: Any) -> list[Question]:
    """The rows' last answers as questions; rows that begin with their answer (plain text) have none."""
    found = []
    for ids, labels in zip(data.input_ids, data.labels, strict=True):
        first, end = last_answer_in(labels)
        if first > 1:
            expected = tokenizer.decode(ids[first:end], skip_special_tokens=True)
            found.append(Question(ids[:first], expected.strip(), end - first))
    return found


def answerable(asked: Iterable[Question], limit: int | None) -> list[Question]:
    """Those that, with their answers, fit into the `limit` tokens that a model takes."""
    return [question for question in asked if limit is None or _tokens(question) <= limit]


def _tokens(question: Question) -> int:
    return len(question.prompt) + question.tokens + _SPARE_TOKENS


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[str]:
    """The model's greedy answer to each question, stripped of what surrounds it.

    Args:
        model: with `generate`; it is put into eval mode and back.
        asked: each `answerable` by the model.
        progress: wraps the list of batches, such as tqdm.
    """
    batches = _batches(asked, batch_size, context_of(model.config))
    answers = [""] * len(asked)
    was_training = model.training
    model.eval()
    try:
        for indices in progress(batches):
            for i, text in zip(indices, _batch(model, tokenizer, [asked[i] for i in indices]), strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    return answers


def count_matches(asked: Sequence[Question], answers: Sequence[str]) -> int:
    """How many answers are the expected ones, but for white space around them."""
    return sum(question.expected == text for question, text in zip(asked, answers, strict=True))


def _batches(asked: Sequence[Question], batch_size: int, limit: int | None) -> list[list[int]]:
    """Questions of like length, as many at once as the context has room for: all are answered to the longest's end."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(asked)), key=lambda i: len(asked[i].prompt)):
        tokens = max(tokens, asked[i].tokens)
        full = not batches or len(batches[-1]) == batch_size
        if full or (limit is not None and len(asked[i].prompt) + tokens + _SPARE_TOKENS > limit):
            batches.append([])
            tokens = asked[i].tokens
        batches[-1].append(i)
    return batches


def _batch(model: Any, tokenizer: Any, asked: Sequence[Question]) -> list[str]:
    length = max(len(question.prompt) for question in asked)
    ids = torch.full((len(asked), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(asked):
        ids[row, length - len(question.prompt) :] = torch.tensor(question.prompt)
        mask[row, length - len(question.prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=max(question.tokens for question in asked) + _SPARE_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    ids, mask = ids.to(place_of(model)), mask.to(place_of(model))
    with generating_by(model, config):
        refuse = LogitsProcessorList([RefuseNaN()])
        tokens = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=refuse)
    return [text.strip() for text in tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)]
