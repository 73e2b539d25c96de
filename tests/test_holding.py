"""Which linears hold their outputs, in models of several families, and that it changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qdora
from qdora import ConfigError
from qdora.architecture import hollow_model
from qdora.groups import freeze_part
from qdora.holding import linears_to_hold
from qdora.inject import adapted_linears, decoder_layers, hold_outputs
from tests.families import make_family

ALL = "all-linear"
CASES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("mistral", ALL, ("mlp.down_proj",)),
    ("qwen2", ALL, ("mlp.down_proj",)),
    ("phi", ALL, ("mlp.fc2",)),
    ("gpt2", ALL, ()),  # a dropout follows, and keeps its mask
    ("gemma2", ALL, ()),  # a norm follows
    ("mistral", ("q_proj", "v_proj"), ()),
    ("mixtral", r".*experts.*|.*q_proj", ()),  # the sum over a token's experts waits for all of them
    ("falcon", ALL, ()),  # adds the residual in place
]


@pytest.mark.parametrize(("family", "targets", "expected"), CASES)
def test_families(family: str, targets: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    path = make_family(family, tmp_path / "model")
    adapter = qdora.AdapterConfig(rank=2, alpha=4, target_modules=targets)
    hollow = hollow_model(path, adapter)
    assert linears_to_hold(hollow) == expected
    assert not any(layer.hold_output or layer._forward_hooks for layer in adapted_linears(hollow).values())
    if expected:
        plain, held = three_steps(path, adapter, ()), three_steps(path, adapter, expected)
        assert all(torch.equal(value, held[name]) for name, value in plain.items())


def three_steps(path: Path, adapter: qdora.AdapterConfig, holding: tuple[str, ...]) -> dict[str, Tensor]:
    """What three steps train."""
    torch.manual_seed(0)
    model = qdora.load_model(path, adapter=adapter, device="cpu").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hold_outputs(model, holding)
    held = sum(layer.hold_output for layer in adapted_linears(model).values())
    assert held == len(holding) * len(decoder_layers(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 100, (2, 24))
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_a_model_whose_step_does_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hollow = hollow_model(make_family("mistral", tmp_path / "model"), qdora.AdapterConfig(rank=2))
    monkeypatch.setattr(type(hollow.model.layers[0].mlp), "forward", lambda *_: 1 / 0)
    with pytest.raises(ConfigError, match=r"outputs of MistralForCausalLM .* division by zero; leave --hold_outputs"):
        linears_to_hold(hollow)


def test_what_has_no_magnitude_to_train_holds_nothing(tmp_path: Path) -> None:
    path = make_family("mistral", tmp_path / "model")
    assert linears_to_hold(hollow_model(path, qdora.AdapterConfig(rank=2, use_dora=False))) == ()
    frozen = hollow_model(path, qdora.AdapterConfig(rank=2))
    freeze_part(frozen, "magnitude")
    assert linears_to_hold(frozen) == ()
