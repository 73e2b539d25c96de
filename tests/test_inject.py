"""Which linears are found, swapped and switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import qdora
from qdora import AdapterConfig, CheckpointError, ConfigError
from qdora.dora import DoRALinear, FrozenLinear
from qdora.gated import GatedMLP
from qdora.inject import (
    adapted_linears,
    attach,
    decoder_layers,
    freeze_dense,
    freeze_packed,
    hold_outputs,
    linear_paths,
    linear_shape,
    make_lean,
    make_plain,
)
from qdora.nf4 import NF4Weight
from qdora.norm import RMSNorm
from qdora.whole import trained_whole
from tests.conftest import disturb
from tests.families import FAMILIES, make_family
from tests.test_nf4 import packed_linear

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


def test_what_is_said_of_a_typo(tiny_nf4: Path) -> None:
    known = r"\(there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\)"
    for targets, message in [
        ("nothing.*", rf"^target_modules 'nothing\.\*' matches no linear {known}$"),
        ("qproj", rf"^target_modules 'qproj' matches no linear {known}; did you mean q_proj\?$"),
        (("q_proj", "vproj"), rf"^target module 'vproj' matches no linear {known}; did you mean v_proj\?$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            qdora.load_model(tiny_nf4, adapter=AdapterConfig(target_modules=targets))


def test_attaching_twice(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig())
    with pytest.raises(ConfigError, match=r"^the model already carries adapters; load it afresh to attach others$"):
        attach(model, AdapterConfig())


def test_attaching_trains_modules_whole(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4)
    assert len(attach(model, AdapterConfig(rank=4, modules_to_save=("norm",)))) == 14
    assert list(trained_whole(model)) == ["model.norm"]


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


class Packed(nn.Module):
    """A linear and a head as somebody may have quantized them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = (packed_linear(torch.randn(96, 128), bias=True) for _ in range(2))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_packed_linears_are_frozen_in_place_and_a_head_is_plain() -> None:
    model = Packed()
    address = model.body.weight.data_ptr()
    biases = [linear.bias.detach().clone() for linear in (model.body, model.head)]
    base = NF4Weight.from_packed_linear(model.head)
    freeze_packed(model, torch.bfloat16)
    body: Any = model.body
    assert isinstance(body, FrozenLinear)
    assert body.base.packed.data_ptr() == address
    assert torch.equal(body.bias, biases[0])
    head = model.head
    assert type(head) is nn.Linear
    assert head.weight.dtype == head.bias.dtype == torch.bfloat16
    assert torch.equal(head.bias, biases[1].bfloat16())
    assert torch.equal(head.weight, base.dequantize(torch.bfloat16))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_keeps_the_bias_and_takes_its_dtype() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(64, 32)})
    x = torch.randn(3, 64)
    before = model["linear"](x)
    assert attach(model, AdapterConfig(rank=4, dtype="float32")) == ["linear"]
    torch.testing.assert_close(model["linear"](x), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_outputs_are_held_where_they_are_named_and_nowhere_else(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    for names in (("mlp.down_proj", "self_attn.o_proj"), ("mlp.down_proj",)):
        hold_outputs(model, names)
        held = {path for path, layer in adapted_linears(model).items() if layer.hold_output}
        assert held == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names}


def test_a_packed_weight_of_another_shape_than_its_module() -> None:
    model = Packed()
    model.body.in_features = 64
    with pytest.raises(CheckpointError, match=r"^the weight of body is \(96, 128\), and \(96, 64\) by config.json$"):
        freeze_packed(model, torch.bfloat16)


def test_dense_linears_are_frozen_over_the_same_memory() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(8, 4), "turned": Conv1D(4, 8), "packed": Packed().body})
    assert linear_shape(model["plain"]) == linear_shape(model["turned"]) == (4, 8)
    x, addresses = torch.randn(3, 8), [model[name].weight.data_ptr() for name in ("plain", "turned")]
    before = [model[name](x) for name in ("plain", "turned")]
    freeze_dense(model)
    for name, address, expected in zip(("plain", "turned"), addresses, before, strict=True):
        frozen: Any = model[name]
        assert isinstance(frozen, FrozenLinear)
        assert frozen.base.weight.data_ptr() == address
        torch.testing.assert_close(frozen(x), expected)
    assert isinstance(model["packed"], Linear4bit)


def test_a_linear_that_computes_otherwise_is_not_frozen() -> None:
    model = nn.ModuleDict({"chooser": Chooser(8, 4), "attention": nn.MultiheadAttention(8, 2)})
    freeze_dense(model)
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())


class Layer(nn.Module):
    """What transformers can checkpoint."""

    gradient_checkpointing = False


def test_decoder_layers_are_the_longest_list_of_what_can_be_checkpointed() -> None:
    model = nn.Module()
    model.none, model.experts = nn.ModuleList(), nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    model.vision, model.text = (nn.ModuleList(Layer() for _ in range(layers)) for layers in (2, 3))
    model.pooler = nn.ModuleList([Layer()])
    assert decoder_layers(model) == list(model.text)
    with pytest.raises(ConfigError, match=r"^Linear has no decoder layers that can be checkpointed or streamed$"):
        decoder_layers(nn.Linear(2, 2))


# Of two layers: a norm before attention and one before the MLP each, and the last; and those on q and k, or on what
# DeepSeek compresses; a Mamba's layer has one. The others' are LayerNorms, or multiply in fp32.
NORMS = {
    **dict.fromkeys(("mamba", "mamba2"), 3),
    **dict.fromkeys(("granitemoehybrid", "bamba", "falcon_h1"), 5),
    **dict.fromkeys(("mistral", "qwen2", "phi3", "mixtral", "qwen2_moe"), 5),
    **dict.fromkeys(("qwen3", "qwen3_moe", "olmoe", "deepseek_v3", "zamba2"), 9),
}
# Of mixtures, the shared experts, and DeepSeek's dense layer.
MLPS = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), 2),
    **dict.fromkeys(("bamba", "falcon_h1", "qwen2_moe", "deepseek_v3"), 2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_lean_norms_and_mlps_change_no_bit_and_no_name(name: str, tmp_path: Path) -> None:
    ids = torch.arange(3, 43)[None]
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(make_family(name, tmp_path / str(dtype)), dtype=dtype)

        def step(model: Any = model) -> tuple[Tensor, Tensor]:
            model.zero_grad()
            logits = model(ids, use_cache=False).logits
            logits.float().square().mean().backward()
            return logits.detach(), model.get_input_embeddings().weight.grad.clone()

        (expected, gradient), names = step(), list(model.state_dict())
        make_lean(model)
        counts = [sum(isinstance(module, kind) for module in model.modules()) for kind in (RMSNorm, GatedMLP)]
        assert counts == [NORMS.get(name, 0), MLPS.get(name, 0)]
        assert list(model.state_dict()) == names
        logits, found = step()
        assert torch.equal(logits, expected)
        assert float((found - gradient).norm() / gradient.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)
