"""The one line: what it takes, what it refuses, and that it does without PEFT what it can: say so."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from peft import IA3Config, LoraConfig

import qdora
from qdora import ConfigError


def test_the_config_stays_peft_s() -> None:
    config = LoraConfig(use_dora=True)
    before = config.to_dict()
    assert qdora.use_in_peft(config) is config
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(lora_bias=True), "asks for lora_bias"),
        (LoraConfig(alora_invocation_tokens=[1]), "asks for alora_invocation_tokens"),
        (IA3Config(), "takes a peft.LoraConfig, found IA3Config"),
        (qdora.AdapterConfig(), "takes a peft.LoraConfig, found AdapterConfig"),
    ],
)
def test_refusals(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qdora.use_in_peft(config)


def test_without_peft() -> None:
    program = """
import sys
sys.modules["peft"] = None
import qdora
assert qdora.use_in_peft
try:
    qdora.use_in_peft(object())
except qdora.ConfigError as error:
    assert "pip install 'qdora[peft]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)
