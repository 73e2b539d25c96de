"""`AdapterConfig`: what it targets, and what it refuses."""

from __future__ import annotations

import pytest

from qdora import AdapterConfig, ConfigError


def test_targets() -> None:
    assert AdapterConfig().targets("model.layers.0.mlp.up_proj")
    names = AdapterConfig(target_modules=["up_proj", "attn.q"])  # type: ignore[arg-type]
    assert names.targets("model.layers.0.mlp.up_proj")
    assert names.targets("layers.1.attn.q")
    assert not names.targets("layers.1.other.q")
    assert not names.targets("model.layers.0.mlp.gate_up_proj")
    expression = AdapterConfig(target_modules=r".*layers\.[01]\..*")
    assert expression.targets("model.layers.1.mlp.up_proj")
    assert not expression.targets("model.layers.2.mlp.up_proj")


def test_patterns_and_scaling() -> None:
    config = AdapterConfig(rank=8, alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.0\..*": 4.0})
    assert config.rank_of("layers.1.q_proj") == 4
    assert config.rank_of("layers.1.k_proj") == 8
    assert config.scaling_of("layers.1.q_proj") == 4
    assert config.scaling_of("layers.0.k_proj") == 0.5
    assert AdapterConfig(rank=16, alpha=8, use_rslora=True).scaling_of("x") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": 10**400}, "alpha=1000"),
        ({"dropout": 1.0}, "dropout"),
        ({"target_modules": []}, "at least one"),
        ({"target_modules": "(("}, "regular expression"),
        ({"rank_pattern": {"q": 0}}, "q=0"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        AdapterConfig(**arguments)
