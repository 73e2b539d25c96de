"""Tool calls in a chat, in the form that its template takes, and only if it has a place for them.

Templates disagree on a call's arguments: most want a mapping and write it as JSON, and given text they would write it
as JSON once more; some want text. Data has both. So a call is tried with a mapping first; where the template stops at
that, or writes it as Python would, the arguments are given as JSON text. And many templates look at no calls at all:
the model would be taught to answer with nothing, so such a chat is refused. Tools that a template leaves out are only
told of, for chats may have them and call none, or describe them in the system message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from qdora.errors import DataError
from qdora.rows import Row

__all__ = ["calls_that_fit", "check_calls", "leaves_tools_out"]

Render = Callable[[list[Row], list[Any] | None], str]


def calls_that_fit(messages: list[Row], tools: list[Any] | None, render: Render) -> list[Row]:
    """The messages with the arguments of their calls as the template takes them.

    Args:
        render: messages and tools through the template; it raises a DataError where the template refuses them.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    mapped = [_with_arguments(message, _as_mapping) for message in messages]
    try:
        text = render(mapped, tools)
    except DataError:
        text = ""
    if text and not any(_is_python(arguments, text) for arguments in _arguments(mapped)):
        return mapped
    return [_with_arguments(message, _as_text) for message in messages]


def check_calls(messages: list[Row], tools: list[Any] | None, render: Render, where: str) -> None:
    """
    Raises:
        DataError: the template leaves calls out.
    """
    if not any(message.get("tool_calls") for message in messages):
        return
    bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    if _renders(render, bare, tools) == render(messages, tools):
        raise DataError(
            f"{where}: the model's chat template has no place for tool calls, and leaves them out; give one that has "
            "with --chat_template_path"
        )


def leaves_tools_out(text: str, messages: list[Row], tools: list[Any] | None, render: Render) -> bool:
    """Whether the template has no place for tools, and the text that it made with them names not all of them either."""
    if not tools:
        return False
    return _renders(render, messages, None) == text and not all(name and name in text for name in _names(tools))


def _names(tools: list[Any]) -> Iterator[str]:
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        yield str(inner.get("name", "") if isinstance(inner, dict) else tool)


def _renders(render: Render, messages: list[Row], tools: list[Any] | None) -> str | None:
    try:
        return render(messages, tools)
    except DataError:
        return None  # a chat that the template refuses without them is none that leaves them out


def _with_arguments(message: Row, form: Callable[[Any], Any]) -> Row:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with(call, form) for call in calls]}


def _call_with(call: Any, form: Callable[[Any], Any]) -> Any:
    """OpenAI's form has the arguments within `function`; some data has them in the call itself."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def _arguments(messages: list[Row]) -> Iterator[Any]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            if isinstance(call, dict):
                inner = call.get("function")
                yield (inner if isinstance(inner, dict) else call).get("arguments")


def _as_mapping(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _is_python(arguments: Any, text: str) -> bool:
    """Whether a mapping stands in the text as Python writes it, which is no JSON."""
    written = str(arguments)
    return isinstance(arguments, dict) and "'" in written and written in text
