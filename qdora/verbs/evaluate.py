"""`qdora evaluate`: base, adapter and merged model on the same questions, side by side.

What is measured, each over the same rows:

    loss, perplexity       of the answers' tokens, every token alike
    exact match            greedy answers that are word for word the expected ones
    multiple choice        the right one of several answers is the most likely (see `choices`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from qdora.answers import Question, answer, answerable, count_matches, questions
from qdora.architecture import context_of, is_nf4_checkpoint
from qdora.arithmetic import place_of
from qdora.choices import Accuracy, Choice, accuracy, choice_rows
from qdora.data import EncodedData, encode, last_answer_in
from qdora.distributed import bar
from qdora.errors import CheckpointError, ConfigError, DataError, NumericsError
from qdora.inject import adapted_linears, adapters_disabled
from qdora.loss import IGNORED
from qdora.measure import padded_batches, row_likelihoods, score
from qdora.model import load_to_answer
from qdora.rows import Row, read_rows
from qdora.scoring import ScoredModel
from qdora.sources import local_model
from qdora.tables import aligned
from qdora.tokenizer import check_ids, tokenizer_of, use_template

__all__ = ["EvaluateReport", "Measured", "evaluate"]


@dataclass(frozen=True)
class Measured:
    """One model's figures."""

    loss: float
    """Nats a token of the answers."""
    perplexity: float
    exact_match: float | None
    """The share of answered questions; None if none were asked."""
    choice_accuracy: float | None
    """The share of questions whose right answer is the most likely; None without choices."""
    choice_accuracy_by_character: float | None
    """The same with likelihoods divided by the answers' lengths in characters."""


@dataclass(frozen=True)
class EvaluateReport:
    """What `evaluate` found."""

    dataset: str
    data: str
    """Counts, in words."""
    answered: int
    """Questions that were answered for the exact match."""
    choice_questions: int
    models: dict[str, Measured]
    """By `base`, `adapter` and `merged`."""
    answers: dict[str, list[tuple[str, str]]]
    """The first few: (expected, given)."""

    def __str__(self) -> str:
        rows = [(name, *(value(measured) for measured in self.models.values())) for name, value in self._rows()]
        return "\n".join([f"{self.dataset}: {self.data}", *aligned([("", *self.models), *rows])])

    def _rows(self) -> list[tuple[str, Callable[[Measured], str]]]:
        rows: list[tuple[str, Callable[[Measured], str]]] = [
            ("loss (nats a token)", lambda m: f"{m.loss:.4f}"),
            ("perplexity", lambda m: f"{m.perplexity:.3f}"),
        ]
        if self.answered:
            rows.append((f"exact match of {self.answered}", lambda m: _percent(m.exact_match)))
        if self.choice_questions:
            name = f"multiple choice of {self.choice_questions}"
            rows.append((name, lambda m: _percent(m.choice_accuracy)))
            rows.append(("  likelihood a character", lambda m: _percent(m.choice_accuracy_by_character)))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


@dataclass(frozen=True)
class _Exam:
    """What every model is asked."""

    data: EncodedData
    asked: list[Question]
    choices: list[Choice]
    choice_data: list[EncodedData]
    batch_size: int

    def ids(self, pad: int | None) -> Iterator[Sequence[int]]:
        """All tokens that a model will see."""
        yield from chain(self.data.input_ids, *(data.input_ids for data in self.choice_data))
        yield from (question.prompt for question in self.asked)
        if self.asked and pad is not None:
            yield [pad]


def evaluate(
    model: str | Path,
    dataset: str | Path,
    adapter: str | Path | None = None,
    merged: str | Path | None = None,
    *,
    dataset_split: str = "test",
    dataset_config: str | None = None,
    chat_template_path: str | Path | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    exact_match_rows: int = 100,
    choices: Sequence[str] = (),
    completion_only_loss: bool = True,
    batch_size: int = 8,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    load_in_4bit: bool | None = None,
    stream_base: bool = False,
    embedding_on_host: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> EvaluateReport:
    """Measure a base model, and an adapter and a merged model beside it, on a data file.

    Args:
        model: an NF4 checkpoint, a 16-bit model directory or a Hub id.
        dataset: a data file or a data set on the Hub, as for `train`; with a column `choices`, multiple choice too.
        adapter: trained on `model`.
        merged: a 16-bit model.
        dataset_split, dataset_config: of a data set on the Hub.
        chat_template_path: a Jinja file, if the tokenizer has no chat template or another is meant.
        max_rows: the first so many rows.
        max_length: cut rows to so many tokens for the loss; by default to what the model takes.
        exact_match_rows: so many rows are answered and compared.
        choices: words of which each answer holds one, see `choices`.
        completion_only_loss: False counts prompts too.
        dtype: of the arithmetic; see `arithmetic.usual_dtype`.
        load_in_4bit: quantize a 16-bit `model` as it loads; by default only if the adapter was trained on NF4.
        allow_other_base: measure the adapter on other weights than it was trained on, see `kinship`.

    Raises:
        QDoRAError: a model, the adapter or the data is wrong.
    """
    _check_counts(1, per_device_eval_batch_size=batch_size, max_rows=max_rows, max_length=max_length)
    _check_counts(0, exact_match=exact_match_rows)
    _check_merged(merged, trust_remote_code)
    tokenizer, whose = tokenizer_of(model, adapter, trust_remote_code)
    use_template(tokenizer, chat_template_path)
    rows = read_rows(dataset, dataset_split, dataset_config)[:max_rows]
    chosen = choice_rows(rows, dataset, choices)
    load = partial(
        load_to_answer,
        dtype=dtype,
        device=device,
        stream_base=stream_base,
        embedding_on_host=embedding_on_host,
        trust_remote_code=trust_remote_code,
    )
    loaded, _ = load(model, adapter, load_in_4bit=load_in_4bit, allow_other_base=allow_other_base)
    limit = context_of(loaded.config)
    length = min(filter(None, (max_length, limit)), default=None)
    exam = _Exam(
        data=encode(rows, tokenizer, length, dataset, not completion_only_loss, bar("tokenize", "rows")),
        asked=answerable(_questions(rows[:exact_match_rows], tokenizer, dataset), limit),
        choices=chosen,
        choice_data=_choice_data(chosen, tokenizer, length, dataset),
        batch_size=batch_size,
    )
    check_ids(loaded, tokenizer, exam.ids(tokenizer.pad_token_id), whose)
    results = {}
    with adapters_disabled(loaded):
        results["base"] = _examine(loaded, tokenizer, exam, "base")
    if adapted_linears(loaded):
        results["adapter"] = _examine(loaded, tokenizer, exam, "adapter")
    del loaded  # there may be no room for two
    if merged is not None:
        plain, _ = load(merged, load_in_4bit=False)
        check_ids(plain, tokenizer, exam.ids(tokenizer.pad_token_id), whose)
        results["merged"] = _examine(plain, tokenizer, exam, "merged")
    models = {name: measured for name, (measured, _) in results.items()}
    answers = {name: given for name, (_, given) in results.items()}
    return EvaluateReport(str(dataset), str(exam.data), len(exam.asked), len(chosen), models, answers)


def _examine(model: Any, tokenizer: Any, exam: _Exam, name: str) -> tuple[Measured, list[tuple[str, str]]]:
    entry = ScoredModel(model)
    lean = entry.head_is_plain()
    rows = list(zip(exam.data.input_ids, exam.data.labels, strict=True))
    batches = list(padded_batches(rows, exam.batch_size, place_of(model)))
    tally = score(entry, (batch for _, batch in bar(f"{name}: loss", "batches")(batches)), lean)
    if not math.isfinite(tally.loss):
        raise NumericsError(f"the loss of {name} is not finite; try --dtype bfloat16 or float32")
    given = answer(model, tokenizer, exam.asked, exam.batch_size, bar(f"{name}: answers", "batches"))
    chosen = _choose(entry, exam, lean, name)
    measured = Measured(
        tally.loss,
        tally.perplexity,
        count_matches(given) / len(given) if given else None,
        None if chosen is None else chosen.by_likelihood,
        None if chosen is None else chosen.by_character,
    )
    return measured, [(answered.expected, answered.given) for answered in given[:20]]


def _choose(entry: ScoredModel, exam: _Exam, lean: bool, name: str) -> Accuracy | None:
    if not exam.choices:
        return None
    rows = [row for data in exam.choice_data for row in zip(data.input_ids, data.labels, strict=True)]
    progress = bar(f"{name}: choices", "batches")
    flat = iter(row_likelihoods(entry, rows, lean, place_of(entry.model), exam.batch_size, progress))
    return accuracy(exam.choices, [[next(flat) for _ in choice.rows] for choice in exam.choices])


def _check_merged(merged: str | Path | None, trust_remote_code: bool) -> None:
    if merged is not None and is_nf4_checkpoint(local_model(merged), trust_remote_code):
        raise CheckpointError(f"{merged} is in NF4, so it is no merged model; give it in the base model's place")


def _questions(rows: list[Row], tokenizer: Any, dataset: str | Path) -> list[Question]:
    """Whole, whatever `max_length` is: an answer that was cut can never be matched."""
    return questions(encode(rows, tokenizer, None, dataset)) if rows else []


def _choice_data(
    chosen: Sequence[Choice], tokenizer: Any, length: int | None, dataset: str | Path
) -> list[EncodedData]:
    """The variants of each question. None may be cut, for it would be measured by its beginning."""
    variants = [_last_answers(encode(choice.rows, tokenizer, length, dataset)) for choice in chosen]
    for number, (data, choice) in enumerate(zip(variants, chosen, strict=True), 1):
        if len(data) != len(choice.rows) or data.cut:
            raise DataError(
                f"{dataset}, row {number}: its choices do not fit in max_length; raise it or leave the row out"
            )
    return variants


def _last_answers(data: EncodedData) -> EncodedData:
    """With labels on each row's last answer alone: what came before is the same for all choices."""
    begins = [last_answer_in(row)[0] for row in data.labels]
    first = min(begins)  # of one, a token may hold the space before it; then that space counts for all
    labels = [
        [IGNORED] * first + ids[first:begin] + row[begin:]
        for begin, ids, row in zip(begins, data.input_ids, data.labels, strict=True)
    ]
    return replace(data, labels=labels)


def _check_counts(at_least: int, **counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < at_least:
            raise ConfigError(f"{name} must be at least {at_least}, found {count}")
