"""What a run learns from and what it is measured on: rows read, parted, rendered and tokenized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qdora.answers import Question, answerable, questions
from qdora.architecture import context_of, load_config
from qdora.data import EncodedData, encode
from qdora.distributed import bar, say
from qdora.errors import DataError
from qdora.flags import RunArguments
from qdora.packing import joins_rows, splits_rows
from qdora.rows import Row, held_out, read_rows

__all__ = ["Corpus", "load_corpus"]


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and what is measured on."""

    data: EncodedData
    evaluation: EncodedData | None
    evaluation_name: str | None
    """The file that it came from."""
    asked: list[Question]
    """To be answered at each evaluation."""

    def ids(self, pad: int | None) -> Iterator[list[int]]:
        """All tokens that the model will see."""
        for data in filter(None, (self.data, self.evaluation)):
            yield from data.input_ids
        yield from (question.prompt for question in self.asked)  # whole, unlike the rows
        if pad is not None:
            yield [pad]


def load_corpus(run: RunArguments, training: Any, tokenizer: Any) -> Corpus:
    """What the flags name, and say how much there is of it.

    Args:
        run, training: as `parse_train` returns them.

    Raises:
        DataError: unreadable, malformed, or nothing to learn from.
    """
    rows = read_rows(run.dataset, run.dataset_split, run.dataset_config)
    numbers, eval_rows, eval_numbers, name = list(range(1, len(rows) + 1)), None, None, run.eval_dataset
    if run.eval_dataset:
        eval_rows = read_rows(run.eval_dataset, run.eval_dataset_split, run.eval_dataset_config)
    elif run.validation_split_percentage:
        kept_back = held_out(len(rows), run.validation_split_percentage, training.seed)
        name, eval_rows, eval_numbers = run.dataset, [rows[i] for i in kept_back], [i + 1 for i in kept_back]
        numbers = sorted({*numbers} - {*eval_numbers})
    data = _load_data([rows[i - 1] for i in numbers], numbers, run.dataset, tokenizer, training)
    if eval_rows is None or name is None:
        return Corpus(data, None, None, [])
    evaluation = _load_data(eval_rows, eval_numbers, name, tokenizer, training, evaluation=True)
    asked: list[Question] = []
    if run.eval_exact_match:
        limit = context_of(load_config(run.model_name_or_path, training.trust_remote_code))
        asked = _questions(eval_rows[: run.eval_exact_match], name, tokenizer, limit)
    return Corpus(data, evaluation, name, asked)


def _questions(rows: list[Row], source: str, tokenizer: Any, limit: int | None) -> list[Question]:
    """Whole, whatever `max_length` is, for an answer that was cut can never be matched; but what the model takes."""
    found = questions(encode(rows, tokenizer, None, source))
    if not found:
        raise DataError(f"{source} has no questions with answers to match; leave out --eval_exact_match")
    fitting = answerable(found, limit)
    if not fitting:
        raise DataError(
            f"{source} has no question that, with its answer, fits into the {limit:,} tokens that the model takes; "
            "leave out --eval_exact_match"
        )
    if left_out := len(found) - len(fitting):
        say(f"{left_out:,} of {len(found):,} questions are left out: they do not fit into what the model takes")
    return fitting


def _load_data(
    rows: list[Row], numbers: list[int] | None, source: str, tokenizer: Any, training: Any, evaluation: bool = False
) -> EncodedData:
    encoded = encode(
        rows,
        tokenizer,
        None if splits_rows(training, evaluation) else training.max_length,
        source,
        loss_on_all=training.completion_only_loss is False,
        progress=bar("tokenize", "rows"),
        numbers=numbers,
        joined=joins_rows(training, evaluation),
    )
    say(f"{'to evaluate on, ' if evaluation else ''}{source}: {encoded}")
    return encoded
