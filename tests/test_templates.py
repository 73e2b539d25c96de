"""Hostile chat templates: each ends soon, in one clear error, and touches nothing."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qdora import DataError
from qdora.data import encode
from qdora.templates import render
from tests.conftest import make_tokenizer

CHAT = [{"messages": [{"role": "user", "content": "12 + 30"}, {"role": "assistant", "content": "42"}]}]


def refusal(template: str) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        encode(CHAT, tokenizer, 64)
    return str(caught.value)


def test_no_way_out_of_the_sandbox(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for template in (
        f"{{{{ cycler.__init__.__globals__.os.popen('touch {canary}') }}}}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(messages) }}",
        "{% include '/etc/passwd' %}",
    ):
        assert "refuses this chat" in refusal(template)
    assert not canary.exists()


def test_loops_end() -> None:
    began = time.perf_counter()
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert "not done after" in refusal(endless)
    assert time.perf_counter() - began < 15
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert "Range too big" in refusal("{% for i in range(1000000000) %}x{% endfor %}")
    assert "recursion" in refusal("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")


def test_memory_ends() -> None:
    for template in ("{{ '%9999999999d' | format(1) }}", "{{ 'x' | center(9999999999) }}", "{{ 'x' * 9999999999 }}"):
        assert "asks for more than 512 MiB" in refusal(template)


def test_powers_are_refused_and_mappings_are_not() -> None:
    assert "powers" in refusal("{{ 10 ** 10 ** 10 }}")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"other": "{{ messages }}", "default": "{{ 10 ** 10 ** 10 }}"}
    with pytest.raises(ValueError, match="powers"):
        render(tokenizer, CHAT[0]["messages"])
    tokenizer.chat_template = "{{ dict(a=1, **{'b': 2}) }}** is text {{ messages[0]['content'] }}"
    assert render(tokenizer, CHAT[0]["messages"]).endswith("** is text 12 + 30")


def test_in_another_thread_there_is_no_timer() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(render(make_tokenizer(), CHAT[0]["messages"], ask=True)))
    thread.start()
    thread.join()
    assert found[0].endswith("assistant\n")
