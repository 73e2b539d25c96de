"""Training data: from rows in one of the usual layouts to token ids, with the loss on the answers.

Where does an answer begin? The text is rendered whole and tokenized once, so that the tokens are those of the text the
model will see, and each token is placed by its offsets: whatever reaches past the beginning of an answer belongs to it.
Tokenizing the parts apart would be simpler and wrong for tokenizers that put a space before each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdora.errors import DataError
from qdora.layouts import OwnTokens, Rendered, recognize, render
from qdora.loss import IGNORED
from qdora.rows import Row

__all__ = ["EncodedData", "encode", "last_answer_in", "marked"]


@dataclass
class EncodedData:
    """Token ids and labels, and what happened on the way."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    """-100 where there is no loss."""
    layout: str
    cut: int = 0
    """Rows whose answer lost its end to `max_length`."""
    dropped: int = 0
    """Rows left out, because no answer was in them or within `max_length`."""
    hidden: int = 0
    """Assistant turns without loss, see `Rendered`."""
    ended: int = 0
    """Rows whose last answer was given an EOS, because the chat template ends it with no token of its own."""
    without_tools: int = 0
    """Rows with tools that the chat template leaves out."""
    begins_in_answer: list[bool] = field(default_factory=list)
    """Whether a row's first token is one of an answer, which carries no loss unless rows are joined."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.input_ids))

    @property
    def answer_tokens(self) -> int:
        return sum(sum(label != IGNORED for label in row) for row in self.labels)

    def __str__(self) -> str:
        text = (
            f"{len(self):,} rows in the {self.layout} layout, {self.tokens:,} tokens, "
            f"{self.answer_tokens:,} of them with loss"
        )
        if self.cut:
            text += f"; {self.cut} answers cut at max_length"
        if self.hidden:
            text += (
                f"; {self.hidden} earlier answers without loss (nothing asks for them, or the chat template rewrites "
                "them when others follow)"
            )
        if self.ended:
            text += f"; {self.ended} answers ended by EOS, for the chat template gives them no end"
        if self.without_tools:
            text += f"; the tools of {self.without_tools} rows left out, for the chat template has no place for them"
        if self.dropped:
            text += f"; {self.dropped} rows without an answer (within max_length) left out"
        return text


def last_answer_in(labels: Sequence[int]) -> tuple[int, int]:
    """(first, end) of the last unbroken run of tokens with loss; there must be one."""
    last = max(i for i, label in enumerate(labels) if label != IGNORED)
    first = max((i for i in range(last) if labels[i] == IGNORED), default=-1) + 1
    return first, last + 1


def marked(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> str:
    """A row's tokens as text, with ⟦ ⟧ around what carries loss."""
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] != IGNORED) != (labels[start] != IGNORED):
            text = tokenizer.decode(ids[start:end])
            parts.append(text if labels[start] == IGNORED else f"⟦{text}⟧")
            start = end
    return "".join(parts)


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int | None,
    source: str | Path = "the data",
    loss_on_all: bool = False,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    numbers: Sequence[int] | None = None,
    joined: bool = False,
) -> EncodedData:
    """Rows to token ids and labels.

    Args:
        tokenizer: a fast one, for its offsets.
        max_length: longer rows lose their end; None keeps them whole.
        source: for messages.
        loss_on_all: loss on prompts too.
        progress: wraps the rows, such as tqdm.
        numbers: of the rows in their file, for messages, if they are not all of it.
        joined: each row will follow another that predicts its first token; otherwise nothing does.

    Raises:
        DataError: a row is malformed, or no row has an answer left.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("the tokenizer has no fast version, and answers are found by its offsets")
    data, own = EncodedData([], [], recognize(rows, source)), OwnTokens.of(tokenizer)
    beyond = 0
    for number, row in zip(numbers or range(1, len(rows) + 1), progress(rows), strict=True):
        rendered = render(row, number, data.layout, tokenizer, source, loss_on_all, own)
        ids, has_loss = _tokenize(rendered, tokenizer, loss_on_all, own)
        is_open = rendered.whole and rendered.ends_in_answer and _is_open(ids, has_loss, tokenizer, own)
        if is_open:
            ids, has_loss = _closed(ids, has_loss, tokenizer)
        length = len(ids) if max_length is None else min(max_length, len(ids))
        if not any(has_loss[1:length]):  # in the row, nothing comes before the first token that could predict it
            data.dropped += 1
            beyond += any(has_loss[1:])
            continue
        data.hidden += rendered.hidden
        data.ended += is_open
        data.without_tools += rendered.without_tools
        data.cut += any(has_loss[length:])
        data.input_ids.append(ids[:length])
        data.begins_in_answer.append(has_loss[0])
        has_loss[0] &= joined
        data.labels.append([i if loss else IGNORED for i, loss in zip(ids[:length], has_loss, strict=False)])
    if not data.input_ids:
        raise DataError(
            f"{source}: no row has an answer to learn from"
            + (f" within max_length={max_length}" if beyond else "")
            + "; every label would be masked"
        )
    return data


def _tokenize(rendered: Rendered, tokenizer: Any, loss_on_all: bool, own: OwnTokens) -> tuple[list[int], list[bool]]:
    # Text that was made for this tokenizer by hand or by a template may begin with its BOS, of which one is enough.
    begun = tokenizer.bos_token is not None and rendered.text.startswith(tokenizer.bos_token)
    encoding = tokenizer(rendered.text, add_special_tokens=not (rendered.whole or begun), return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    offsets: list[tuple[int, int]] = encoding["offset_mapping"]
    if loss_on_all:
        has_loss = [True] * len(ids)
    else:
        # A token of the tokenizer's own may swallow the space after it, and is still no part of what follows.
        has_loss = [
            any(
                _reaches(place, answer) and not (token in own.ids and rendered.text[place[0] : answer[0]].strip())
                for answer in rendered.answers
            )
            for token, place in zip(ids, offsets, strict=True)
        ]
    if not rendered.whole and tokenizer.eos_token_id is not None:
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
            has_loss.append(True)
        has_loss[-1] = True  # also where the tokenizer added it: an answer ends
    return ids, has_loss


def _reaches(place: tuple[int, int], answer: tuple[int, int]) -> bool:
    """Whether a token lies in an answer. Some tokenizers give white space offsets of no length, (end, end)."""
    (start, end), (first, last) = place, answer
    return first < end <= last if start == end else end > first and start < last


def _is_open(ids: list[int], has_loss: list[bool], tokenizer: Any, own: OwnTokens) -> bool:
    """Whether the last answer ends in words, so that nothing would teach a model to stop."""
    backwards = (token for token, loss in zip(reversed(ids), reversed(has_loss), strict=True) if loss)
    # Many templates write a line's end after the token that ends an answer.
    last = next((token for token in backwards if tokenizer.decode([token]).strip()), None)
    return tokenizer.eos_token_id is not None and last is not None and last not in own.ids


def _closed(ids: list[int], has_loss: list[bool], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ended by EOS right after the answer, where generation has to stop."""
    end = max(i for i, loss in enumerate(has_loss) if loss) + 1
    return [*ids[:end], tokenizer.eos_token_id], [*has_loss[:end], True]
