"""What was probably meant."""

from __future__ import annotations

import pytest

from qdora.nearest import did_you_mean, nearest

KNOWN = ["learning_rate", "model_name_or_path", "lora_r", "max_steps", "max_length"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learing_rate", "learning_rate"),
        ("modle", "model_name_or_path"),
        ("MAX_STEP", "max_steps"),
        ("rank", "lora_r"),
        ("zzzzzz", None),
    ],
)
def test_the_nearest_name(name: str, meant: str | None) -> None:
    assert nearest(name, KNOWN, {"rank": "lora_r"}) == meant


def test_as_the_end_of_a_sentence() -> None:
    assert did_you_mean("max_stpes", KNOWN) == "; did you mean max_steps?"
    assert did_you_mean("zzzzzz", KNOWN) == did_you_mean("a", []) == ""
