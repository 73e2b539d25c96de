"""Which linears are found, swapped and switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qdora
from qdora import AdapterConfig, ConfigError
from qdora.dora import DoRALinear, FrozenLinear
from qdora.inject import adapted_linears, attach, linear_paths, make_plain
from tests.conftest import disturb

IDS = torch.arange(3, 23)[None]


def test_exactly_the_adapter_trains(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "magnitude_offset"}
    assert len(adapted_linears(model)) == len(linear_paths(model)) == 14
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)


def test_patterns_reach_the_layers(tiny_nf4: Path) -> None:
    ranks, alphas = {r"layers\.1\..*": 2}, {"q_proj": 1.0}
    targets = ("q_proj", "up_proj")
    config = AdapterConfig(rank=4, alpha=8, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
    layers = adapted_linears(qdora.load_model(tiny_nf4, adapter=config))
    assert len(layers) == 4
    assert layers["model.layers.1.mlp.up_proj"].rank == 2
    assert layers["model.layers.0.self_attn.q_proj"].scaling == 0.25
    others = [m for m in qdora.load_model(tiny_nf4, adapter=config).modules() if isinstance(m, FrozenLinear)]
    assert len(others) == 10


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj"), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (r".*\.mlp\..*", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_attention_or_mlp_alone(tiny_nf4: Path, targets: str | tuple[str, ...], names: set[str]) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, target_modules=targets)).train()
    disturb(model)
    layers = adapted_linears(model)
    assert {path.rpartition(".")[2] for path in layers} == names
    assert len(layers) == 2 * len(names)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(IDS, labels=IDS).loss.backward()
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, f"{path}.{name}"


def test_a_typo_in_the_targets(tiny_nf4: Path) -> None:
    for targets in (("q_proj", "qq_proj"), "nothing.*", ("lm_head",)):
        with pytest.raises(ConfigError, match=r"matches no linear \(there are .*down_proj"):
            qdora.load_model(tiny_nf4, adapter=AdapterConfig(target_modules=targets))


def test_attaching_twice(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig())
    with pytest.raises(ConfigError, match="already carries adapters"):
        attach(model, AdapterConfig())


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_a_fresh_adapter_changes_no_logit(tiny: Path, load_in_4bit: bool, use_dora: bool) -> None:
    base = qdora.load_model(tiny, load_in_4bit=load_in_4bit)(IDS).logits
    model = qdora.load_model(tiny, adapter=AdapterConfig(use_dora=use_dora), load_in_4bit=load_in_4bit)
    assert isinstance(model.model.layers[0].mlp.up_proj, DoRALinear)
    assert torch.equal(model(IDS).logits, base)


def test_disabled_adapters_give_the_base(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig())
    fresh = model(IDS).logits
    disturb(model)
    trained = model(IDS).logits
    assert not torch.equal(trained, fresh)
    with qdora.adapters_disabled(model):
        assert torch.equal(model(IDS).logits, fresh)
    assert torch.equal(model(IDS).logits, trained)


class Renamed(nn.Linear):
    """As `nn.Linear`, under another name."""


class Chooser(nn.Linear):
    """No linear to whom calls it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).argmax(-1)


def test_what_only_looks_like_a_linear_is_left_alone() -> None:
    model = nn.ModuleDict(
        {"plain": nn.Linear(8, 8), "renamed": Renamed(8, 4, bias=False), "chooser": Chooser(8, 4)}
        | {"attention": nn.MultiheadAttention(8, 2)}
    )
    weight, x = model["renamed"].weight, torch.randn(3, 8)
    before = model["renamed"](x)
    make_plain(model)
    assert [type(model[name]) for name in ("plain", "renamed", "chooser")] == [nn.Linear, nn.Linear, Chooser]
    assert model["renamed"].weight is weight
    assert torch.equal(model["renamed"](x), before)
    assert type(model["attention"].out_proj) is not nn.Linear
    assert linear_paths(model) == ["plain", "renamed"]
