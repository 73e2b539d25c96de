"""Expressions that would take longer than a life, and those that are what people write."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from qdora import AdapterConfig, ConfigError
from qdora.patterns import check_pattern, is_tame, matches

NAME = "model.layers.10.self_attn.q_proj"
HOSTILE = [
    r"(\w|\.|[a-z])*(?<!j)",
    r"(a|\w|.)*!{1}",
    r"(?:\w|[a-z._0-9])+(?<!j)",
    r"(.*)*.*.*.*.*.*.*(?<!j)",
    r"((\w+\.?)+)+(?<!j)",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_expression_ends(pattern: str) -> None:
    began = time.perf_counter()
    check_pattern(pattern)
    with suppress(ConfigError):
        assert not matches(pattern, NAME * 3)
    assert time.perf_counter() - began < 10
    assert not is_tame(pattern)


def test_the_time_is_limited() -> None:
    with pytest.raises(ConfigError, match="still trying to match"):
        matches(r"(\w|\.|[a-z])*(?<!j)", f"{NAME}j" * 3)


@pytest.mark.parametrize("pattern", ["(", "a" * 20_000, "(" * 5_000, r"(?P<x", 7])
def test_what_is_no_expression(pattern: str) -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern", ["lm_head", "model.layers.1", r"model\.layers\..*\.mlp\.gate", "visual.*", "re:x.+y"]
)
def test_what_people_skip_is_tame(pattern: str) -> None:
    assert is_tame(pattern)


def test_what_people_target_matches() -> None:
    unsloth = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\..*)"
    for pattern in (unsloth, r"(?:(?!visual).)*q_proj", r"model\.(\w+\.)+q_proj"):
        assert AdapterConfig(target_modules=pattern).targets(NAME)


def test_a_group_of_a_rank_pattern_is_counted_as_peft_counts_it() -> None:
    # PEFT puts a group before the pattern, so that \2 is the pattern itself, and refers to what is not closed.
    with pytest.raises(ConfigError, match="regular expression"):
        AdapterConfig(rank_pattern={r"(q)_\2": 4})
