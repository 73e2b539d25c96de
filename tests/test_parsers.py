"""Flags of the verbs, and every mistake in them answered in one line."""

from __future__ import annotations

import inspect

import pytest

import qdora
from qdora import ConfigError
from qdora.parsers import PARSERS, parse


def test_names_and_defaults() -> None:
    options = parse("evaluate", ["m", "--dataset", "d", "--max-rows=5", "--stream_base", "--choices", "a", "b"])
    assert (options.model, options.dataset, options.max_rows, options.stream_base) == ("m", "d", 5, True)
    assert (options.choices, options.load_in_4bit, options.exact_match_rows) == (["a", "b"], None, 100)
    assert parse("evaluate", ["m", "--dataset", "d", "--load_in_4bit", "false"]).load_in_4bit is False
    assert parse("chat", ["m", "--prompt", "a", "--prompt", "--b-c"[2:]]).prompts == ["a", "b-c"]
    assert [parse("merge", ["b", "a", "o", *more]).verify for more in ([], ["--verify"], ["--no-verify"])] == [
        *[None, True, False]
    ]


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("merge", ["b", "a"], "the following arguments are required: OUT; `qdora merge --help`"),
        ("merge", ["b", "a", "o", "--verfy"], "unknown flag --verfy; did you mean --verify?"),
        (
            "merge",
            ["b", "a", "o", "--verify", "--no-verify"],
            "--no_verify: not allowed with argument --verify; choose one",
        ),
        ("quantize", ["m", "o", "--skip-module", "x"], "did you mean --skip_modules?"),
        ("quantize", ["m", "o", "p"], "one word too many: 'p'"),
        ("chat", ["m", "--zzzzzz"], "unknown flag --zzzzzz; `qdora chat --help`"),
        ("chat", ["m", "--temperature", "hot"], "invalid float value: 'hot'"),
        ("evaluate", ["m"], "--dataset"),
        ("evaluate", ["m", "--dataset", "d", "--stream_base", "maybe"], "expected true or false, found 'maybe'"),
        ("inspect", [], "required: ADAPTER"),
    ],
)
def test_mistakes(verb: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(verb, arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("verb", PARSERS)
def test_every_flag_is_explained(verb: str) -> None:
    for action in PARSERS[verb]()._actions:
        assert action.help, action.option_strings


@pytest.mark.parametrize("verb", sorted(PARSERS.keys() - {"completion"}))
def test_every_flag_is_a_parameter(verb: str) -> None:
    flags = {action.dest for action in PARSERS[verb]()._actions} - {"help", "output_file"}
    parameters = inspect.signature(getattr(qdora, verb)).parameters.keys()
    assert flags <= parameters
    assert parameters - flags <= {"terminal"}


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    options = parse("evaluate", ["~/m", "--dataset=~/d.jsonl", "--output_file=~/f.json", "--adapter", "a"])
    assert (options.model, options.dataset, options.output_file, options.adapter) == (
        *("/home/ada/m", "/home/ada/d.jsonl", "/home/ada/f.json", "a"),
    )
