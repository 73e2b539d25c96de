"""Magnitude and direction with rates of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer

import qdora
from qdora import AdapterConfig, ConfigError
from qdora.groups import Rates, freeze_part, parameter_groups, rates_by_part


@pytest.fixture
def model(tiny_nf4: Path) -> torch.nn.Module:
    return qdora.load_model(tiny_nf4, adapter=qdora.AdapterConfig(rank=2))


def summary(model: torch.nn.Module, rates: Rates) -> dict[str, tuple[int, float, float]]:
    groups = parameter_groups(model, rates)
    return {group["name"]: (len(group["params"]), group["lr"], group["weight_decay"]) for group in groups}


def test_what_is_not_said_is_the_direction_s(model: torch.nn.Module) -> None:
    assert summary(model, Rates(1e-3, 0.1)) == {"direction": (28, 1e-3, 0.1), "magnitude": (14, 1e-3, 0.1)}


def test_each_part_has_its_rates(model: torch.nn.Module) -> None:
    rates = Rates(1e-3, 0.1, magnitude_learning_rate=0.0, magnitude_weight_decay=0.5, b_ratio=16)
    assert summary(model, rates) == {
        "direction": (14, 1e-3, 0.1),
        "direction, B": (14, 1.6e-2, 0.1),
        "magnitude": (14, 0.0, 0.5),
    }


@pytest.mark.parametrize(("part", "left"), [("none", 42), ("magnitude", 28), ("direction", 14)])
def test_freezing(model: torch.nn.Module, part: str, left: int) -> None:
    freeze_part(model, part)
    assert sum(len(group["params"]) for group in parameter_groups(model, Rates(1.0))) == left


def test_vectors_that_are_trained_whole_do_not_decay(tiny_nf4: Path) -> None:
    config = AdapterConfig(rank=2, modules_to_save=("lm_head", "input_layernorm", "norm"))
    model = qdora.load_model(tiny_nf4, adapter=config)
    decay = {name: 0.1 for name, p in model.named_parameters() if p.requires_grad}
    usual = set(Trainer.get_decay_parameter_names(None, model))
    by_id = {id(p): name for name, p in model.named_parameters()}
    for group in parameter_groups(model, Rates(1e-3, weight_decay=0.1)):
        for parameter in group["params"]:
            decay[by_id[id(parameter)]] = group["weight_decay"]
    whole = {name: value for name, value in decay.items() if ".trained." in name}
    assert len(whole) == 4
    assert whole == {name: 0.1 if name in usual else 0.0 for name in whole}


def test_mistakes(tiny_nf4: Path) -> None:
    lora = qdora.load_model(tiny_nf4, adapter=qdora.AdapterConfig(rank=2, use_dora=False))
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze_part(lora, "direction")
    with pytest.raises(ConfigError, match="found 'bias'"):
        freeze_part(lora, "bias")
    with pytest.raises(ConfigError, match="magnitude_learning_rate must be at least 0, found -1"):
        Rates(1.0, magnitude_learning_rate=-1)
    with pytest.raises(ConfigError, match="must be above 0"):
        Rates(1.0, b_ratio=0)
    with pytest.raises(ConfigError, match="found nan"):
        Rates(float("nan"))


def test_the_rate_of_each_part(model: torch.nn.Module) -> None:
    alike = rates_by_part(parameter_groups(model, Rates(1e-3)))
    assert alike == {"learning_rate_magnitude": 1e-3, "learning_rate_A": 1e-3, "learning_rate_B": 1e-3}
    apart = rates_by_part(parameter_groups(model, Rates(1e-3, magnitude_learning_rate=1e-4, b_ratio=16)))
    assert apart == {"learning_rate_magnitude": 1e-4, "learning_rate_A": 1e-3, "learning_rate_B": 0.016}
    freeze_part(model, "magnitude")
    assert rates_by_part(parameter_groups(model, Rates(1e-3))).keys() == {"learning_rate_A", "learning_rate_B"}
    assert rates_by_part([{"lr": 1.0, "params": []}]) == {}
