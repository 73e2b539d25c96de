"""The messages of a row, by the names that chat templates know.

Rows write chats in four ways, and have fields beside them: a system message or earlier turns in columns of their own
(alpaca, ShareGPT), settings for the template (`chat_template_kwargs`), a weight of 0 on an answer that is not to be
learned (OpenAI). What would change the meaning and has no place here is refused rather than left out.
"""

from __future__ import annotations

from typing import Any

from qdora.errors import DataError, shown
from qdora.rows import Row, holds_half_a_pair, parse_json

__all__ = [
    "ALPACA",
    "CHAT",
    "PAIR",
    "SHAREGPT",
    "TEXT",
    "check_roles",
    "is_learned",
    "messages_of",
    "settings_of",
    "text_of",
    "tools_of",
    "turns_of",
]

CHAT, SHAREGPT, ALPACA, PAIR, TEXT = "messages", "sharegpt", "alpaca", "prompt/completion", "text"
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}
_ROLES = ("system", "user", "assistant", "tool", "developer", "function")


def messages_of(row: Row, layout: str, where: str) -> tuple[list[Row], int]:
    """A row's messages, and which of them is the first that may be an answer to learn.

    Raises:
        DataError: a field is missing or of the wrong type; `where` says whose.
    """
    if layout == PAIR:
        prompt = turns_of(row, "prompt", "role", "content", where)
        return [*prompt, *turns_of(row, "completion", "role", "content", where)], len(prompt)
    if layout == ALPACA:
        question = text_of(row, "instruction", where)
        if row.get("input"):
            question += "\n\n" + text_of(row, "input", where)
        turns = [*_system(row, where), *_history(row, where), *_turn(question, text_of(row, "output", where))]
        return turns, 0
    if layout == SHAREGPT:
        turns = turns_of(row, "conversations", "from", "value", where)
        return [*([] if turns[0]["role"] == "system" else _system(row, where)), *turns], 0
    return turns_of(row, "messages", "role", "content", where), 0


def _system(row: Row, where: str) -> list[Row]:
    return [{"role": "system", "content": text_of(row, "system", where)}] if row.get("system") else []


def _history(row: Row, where: str) -> list[Row]:
    """Earlier turns, as pairs of question and answer."""
    pairs = row.get("history") or []
    is_list = isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if not is_list or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise DataError(f"{where}: the field 'history' must be a list of pairs of question and answer")
    return [message for question, answer in pairs for message in _turn(question, answer)]


def _turn(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_roles(messages: list[Row], where: str) -> None:
    """That a chat without an answer does not lack it for a misspelled role; templates may know more than the usual.

    Raises:
        DataError: nobody is the assistant, and somebody is of no known role.
    """
    roles = [message["role"] for message in messages]
    unknown = [role for role in roles if role not in _ROLES]
    if unknown and "assistant" not in roles:
        raise DataError(
            f"{where}: no turn has the role 'assistant', and {shown(unknown[0])} is none of {', '.join(_ROLES)}; "
            "call who answers 'assistant'"
        )


def is_learned(message: Row) -> bool:
    """Whether it is an answer, and not one whose weight is 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def settings_of(row: Row, where: str) -> dict[str, Any]:
    """What the row asks of the template: its `chat_template_kwargs`."""
    settings = row.get("chat_template_kwargs")
    if isinstance(settings, str):
        settings = parse_json(settings, f"{where}, chat_template_kwargs") if settings.strip() else None
    if settings is not None and not isinstance(settings, dict):
        raise DataError(f"{where}: the field 'chat_template_kwargs' must be an object, found {type(settings).__name__}")
    return {name: value for name, value in (settings or {}).items() if value is not None}


def tools_of(row: Row, where: str) -> list[Any] | None:
    """The functions that the model may call, as the template wants them: a list of JSON schemas."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, f"{where}, tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: the field 'tools' must be a list, found {type(tools).__name__}")
    return tools


def text_of(row: Row, column: str, where: str) -> str:
    """The text in that column.

    Raises:
        DataError: there is none.
    """
    value = row.get(column)
    if value is None:
        raise DataError(f"{where}: the field {column!r} is missing")
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {column!r} must be text, found {type(value).__name__}")
    if holds_half_a_pair(value):
        raise DataError(f"{where}: the field {column!r} holds half of a surrogate pair, which is no character")
    return value


def turns_of(row: Row, column: str, role_key: str, content_key: str, where: str) -> list[Row]:
    """The turns in that column.

    Raises:
        DataError: there are none, or one lacks its speaker or its words.
    """
    turns = row.get(column)
    if turns is None:
        raise DataError(f"{where}: the field {column!r} is missing")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: {column!r} must be a list of messages, each with {role_key!r} and {content_key!r}")
    return [_message(turn, role_key, content_key, where) for turn in turns]


def _message(turn: Row, role_key: str, content_key: str, where: str) -> Row:
    """One turn by the names that templates know; what else it has (tool_calls, name, …) stays."""
    role = text_of(turn, role_key, where)
    if turn.get("function_call"):
        raise DataError(f"{where}: 'function_call' is of an older format, and templates leave it out; use 'tool_calls'")
    if role_key == "from":
        if role not in _SHAREGPT_ROLES:
            raise DataError(f"{where}: unknown speaker {role!r}; known are {', '.join(_SHAREGPT_ROLES)}")
        role = _SHAREGPT_ROLES[role]
    others = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    if not others.get("tool_calls"):
        others.pop("tool_calls", None)  # to some templates an empty list is a call
    without_words = "tool_calls" in others and turn.get(content_key) is None
    return {**others, "role": role, "content": "" if without_words else text_of(turn, content_key, where)}
