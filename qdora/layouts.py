"""The usual layouts of training data, and where in a row its answers are.

layout              columns                                         becomes
messages            messages: [{role, content}, …]                  the chat template; loss on assistant turns
sharegpt            conversations: [{from, value}, …]               likewise
alpaca              instruction, output, and input if any           likewise, one user and one assistant turn
prompt/completion   prompt, completion, both text                   as they are, one after the other, then EOS
prompt/completion   prompt, completion, both lists of messages      the chat template; loss on the completion
text                text                                            as it is, then EOS; loss on everything
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdora.chats import (
    ALPACA,
    CHAT,
    PAIR,
    SHAREGPT,
    TEXT,
    check_roles,
    is_learned,
    messages_of,
    settings_of,
    text_of,
    tools_of,
    turns_of,
)
from qdora.errors import DataError, reason, shown
from qdora.rows import Row, holds_half_a_pair
from qdora.templates import render as render_template
from qdora.toolcalls import calls_that_fit, check_calls, leaves_tools_out

__all__ = ["OwnTokens", "Rendered", "last_answer", "recognize", "render", "with_last_answer"]

_COLUMNS = {
    CHAT: ("messages",),
    SHAREGPT: ("conversations",),
    PAIR: ("prompt", "completion"),
    ALPACA: ("instruction", "output"),
    TEXT: ("text",),
}
# Where a chat's turns stand: column, and each turn's keys for speaker and words.
_TURNS = {
    CHAT: ("messages", "role", "content"),
    SHAREGPT: ("conversations", "from", "value"),
    PAIR: ("completion", "role", "content"),
}


@dataclass(frozen=True)
class Rendered:
    """One row as the model sees it."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Spans of characters that carry loss."""
    whole: bool
    """Already complete with its special tokens (a chat template's output); otherwise BOS and EOS are added."""
    hidden: int = 0
    """Assistant turns that carry no loss: the template renders them otherwise once others follow, or nothing comes
    before them that could ask for an answer."""
    ends_in_answer: bool = False
    """Whether an assistant's turn is the last thing in a chat."""
    without_tools: bool = False
    """Whether the row has tools for which the chat template has no place."""


@dataclass(frozen=True)
class OwnTokens:
    """The tokenizer's own tokens, such as those that begin and end a turn. Some have thousands: looked up once."""

    ids: frozenset[int]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> OwnTokens:
        """Those of a tokenizer, as it is now."""
        found = tokenizer.added_tokens_decoder
        texts = sorted({str(token) for token in found.values()} - {""}, key=len, reverse=True)
        return cls(frozenset(found), re.compile("|".join(map(re.escape, texts)) or r"(?!)"))

    def has_words(self, text: str) -> bool:
        """Whether there is anything in it but those."""
        return bool(self.pattern.sub("", text).strip())


def recognize(rows: Sequence[Row], source: str | Path) -> str:
    """The layout of the data, by the columns of its first row.

    Raises:
        DataError: none that is known.
    """
    columns = rows[0].keys()
    if not columns:
        raise DataError(f"{source}: the first row has no columns at all; leave out what is empty")
    for layout, needed in _COLUMNS.items():
        if all(column in columns for column in needed):
            return layout
    known = "; ".join(f"{layout}: {', '.join(needed)}" for layout, needed in _COLUMNS.items())
    found = reason(ValueError(", ".join(columns)))
    raise DataError(f"{source} has the columns {found}, which is no known layout ({known})")


def render(
    row: Row,
    number: int,
    layout: str,
    tokenizer: Any,
    source: str | Path,
    loss_on_all: bool = False,
    own: OwnTokens | None = None,
) -> Rendered:
    """One row as text, with its answers marked; with `loss_on_all`, as one answer.

    Args:
        own: the tokenizer's, if they are known.

    Raises:
        DataError: a field is missing or of the wrong type; the row is named by its number.
    """
    where = f"{source}, row {number}"
    if layout == TEXT:
        text = text_of(row, "text", where)
        return Rendered(text, ((0, len(text)),), whole=False)
    if layout == PAIR and not isinstance(row.get("prompt"), list):
        prompt, completion = text_of(row, "prompt", where), text_of(row, "completion", where)
        begin = 0 if loss_on_all else len(prompt)
        return Rendered(prompt + completion, ((begin, len(prompt) + len(completion)),), whole=False)
    messages, first_answer = messages_of(row, layout, where)
    own = own or OwnTokens.of(tokenizer)
    template = _Template(tokenizer, own, tools_of(row, where), settings_of(row, where), where)
    messages = calls_that_fit(messages, template.tools, template.render)
    check_calls(messages, template.tools, template.render, where)
    if loss_on_all:
        text = template(messages)
        rendered = Rendered(text, ((0, len(text)),), whole=True, ends_in_answer=messages[-1]["role"] == "assistant")
    else:
        check_roles(messages, where)
        rendered = _mark_answers(messages, first_answer, template, where)
    return replace(rendered, without_tools=leaves_tools_out(rendered.text, messages, template.tools, template.render))


def last_answer(row: Row, layout: str, where: str) -> str:
    """The text that a row's last answer is.

    Raises:
        DataError: plain text has no answers, or a chat ends with another's turn.
    """
    if layout == TEXT:
        raise DataError(f"{where}: plain text has no question and no answer")
    if layout == ALPACA:
        return text_of(row, "output", where)
    if layout == PAIR and not isinstance(row.get("completion"), list):
        return text_of(row, "completion", where)
    column, role_key, content_key = _TURNS[layout]
    turns = turns_of(row, column, role_key, content_key, where)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: the chat does not end with an answer")
    answer: str = turns[-1]["content"]
    return answer


def with_last_answer(row: Row, layout: str, answer: str) -> Row:
    """The row with another text as its last answer; `last_answer` must have found one."""
    if layout == ALPACA:
        return {**row, "output": answer}
    if layout == PAIR and not isinstance(row["completion"], list):
        return {**row, "completion": answer}
    column, _, content_key = _TURNS[layout]
    last = {key: value for key, value in row[column][-1].items() if key != "weight"}
    return {**row, column: [*row[column][:-1], {**last, content_key: answer}]}


class _Template:
    """A tokenizer's chat template over some tools, with errors that name the row."""

    def __init__(
        self, tokenizer: Any, own: OwnTokens, tools: list[Any] | None, settings: dict[str, Any], where: str
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{where}: a chat, but the model's tokenizer has no chat template; give one with --chat_template_path, "
                "or use the prompt/completion or text layout"
            )
        self.tokenizer, self.own, self.tools, self.settings, self.where = tokenizer, own, tools, settings, where

    def __call__(self, messages: list[Row], ask: bool = False) -> str:
        return self.render(messages, self.tools, ask)

    def render(self, messages: list[Row], tools: list[Any] | None, ask: bool = False) -> str:
        """With other tools, or without."""
        try:
            text = render_template(self.tokenizer, messages, tools, ask, self.settings)
        except Exception as error:
            # jinja raises its own errors, and templates raise what they like
            raise DataError(f"{self.where}: the chat template refuses this chat: {reason(error)}") from None
        if holds_half_a_pair(text):
            raise DataError(f"{self.where}: the chat holds half of a surrogate pair, which is no character")
        return text


def _mark_answers(messages: list[Row], first_answer: int, template: _Template, where: str) -> Rendered:
    """An answer is what the chat gains between the request for it and its end.

    Some templates render an earlier turn otherwise once others follow (they take out its reasoning); such a turn has no
    place in the text and is counted. If that is so of the last, nothing could be learned.
    """
    text = template(messages)
    spans, hidden = [], 0
    for i, message in enumerate(messages):
        if not is_learned(message) or i < first_answer:
            continue
        if i == 0:
            hidden += 1  # what comes before it is the template's own, and many refuse to render that alone
            continue
        before, after = template(messages[:i], ask=True), template(messages[: i + 1])
        words = message["content"].strip()
        end = _shared_end(text, before, after, words, template.own.pattern)
        if end is not None:
            answer = text[len(before) : end]
            # An answer may be all tokens of the tokenizer's own; then it stands there as it is.
            if words not in answer and template.own.has_words(words) and not template.own.has_words(answer):
                raise DataError(
                    f"{where}: the chat template leaves the answer's words out; give another with --chat_template_path"
                )
            spans.append((len(before), end))
        elif i == len(messages) - 1:
            raise DataError(
                f"{where}: the chat template asks for the answer with {shown(before[-30:])} and renders it otherwise, "
                "which hides where it begins; give another by --chat_template_path, train on everything with "
                "--completion_only_loss false, or use the prompt/completion layout"
            )
        else:
            hidden += 1
    last = messages[-1]["role"] == "assistant"
    return Rendered(text, tuple(spans), whole=True, hidden=hidden, ends_in_answer=last)


def _shared_end(text: str, before: str, after: str, words: str, marks: re.Pattern[str]) -> int | None:
    """Where an answer ends in the text of the whole chat; None if it does not stand there as it was given.

    Args:
        before, after: the chat up to the answer, and with it.
        words: the answer's.

    Some templates write another token after what comes last than between turns (Phi-3: EOS; gpt-oss: `<|return|>` for
    `<|end|>`). Then the answer is what both have, and the token that ends it in the whole chat.
    """
    if not (after.startswith(before) and text.startswith(before)):
        return None
    if text.startswith(after):
        return len(after.rstrip())
    end = len(before)
    while text[end : end + 1] == after[end : end + 1] != "":
        end += 1
    end = next((mark.start() for mark in marks.finditer(after) if mark.start() < end < mark.end()), end)
    found = after.rfind(words, len(before), end) if words else -1
    if found < 0:
        return None
    if marks.search(after, found + len(words), end) is None and (mark := marks.match(text, end)) is not None:
        return mark.end()
    return len(text[:end].rstrip())
