"""Experts out of files: packed, in 16 bits, stacked, cut short; and adapters on them, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qdora
from qdora import AdapterConfig, CheckpointError, ConfigError
from qdora.dense import DenseWeight
from qdora.inject import adapted_linears
from qdora.loader import NF4Config, key_names
from tests.conftest import disturb
from tests.families import make_family

IDS = torch.arange(3, 43)[None]
EXPERT = "model.layers.0.mlp.experts.1"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("qwen3_moe", tmp_path_factory.mktemp("mixture") / "model")


@pytest.fixture(scope="module")
def mixture_nf4(mixture: Path) -> Path:
    qdora.quantize(mixture, mixture.parent / "nf4")
    return mixture.parent / "nf4"


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits.detach().float()
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def copy_with(source: Path, out: Path, change: Any) -> Path:
    """The model with other tensors."""
    out.mkdir()
    for file in source.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def stack(tensors: dict[str, torch.Tensor]) -> None:
    for layer in (0, 1):
        path = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{path}.{number}.{name}_proj.weight") for number in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{path}.gate_up_proj": torch.cat([gate, up], dim=1), f"{path}.down_proj": down}


def test_quantized_as_it_loads_from_matrices_or_stacks(mixture: Path, mixture_nf4: Path, tmp_path: Path) -> None:
    expected = logits(qdora.load_model(mixture_nf4))
    assert torch.equal(logits(qdora.load_model(mixture)), expected)
    stacked = copy_with(mixture, tmp_path / "stacked", stack)
    model = qdora.load_model(stacked, adapter=AdapterConfig(rank=2))
    assert torch.equal(logits(model), expected)
    qdora.quantize(stacked, tmp_path / "nf4")
    assert torch.equal(logits(qdora.load_model(tmp_path / "nf4")), expected)

    qdora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds experts as stacks"):
        qdora.merge(stacked, tmp_path / "adapter", tmp_path / "out")
    qdora.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out")


def test_dense_experts_are_those_of_transformers(mixture: Path) -> None:
    dense = qdora.load_model(mixture, load_in_4bit=False, dtype="float32")
    assert isinstance(dense.get_submodule(EXPERT).up_proj.base, DenseWeight)
    plain = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    assert error(logits(dense), logits(plain)) < 1e-5


def test_experts_that_were_left_out(mixture: Path, tmp_path: Path) -> None:
    report = qdora.quantize(mixture, tmp_path / "nf4", skip_modules=["experts"])
    assert "as asked: model.layers.0.mlp.experts.*.down_proj, " in str(report)
    model = qdora.load_model(tmp_path / "nf4")
    assert isinstance(model.get_submodule(EXPERT).up_proj.base, DenseWeight)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.bfloat16).train()
    assert error(logits(model), logits(plain)) < 1.5e-2


@pytest.mark.parametrize("packed", [True, False])
def test_damage_is_named(packed: bool, mixture: Path, mixture_nf4: Path, tmp_path: Path) -> None:
    key = f"{EXPERT}.up_proj.weight"
    source = mixture_nf4 if packed else mixture
    missing = copy_with(source, tmp_path / "missing", lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.1\.up_proj is missing"):
        qdora.load_model(missing)
    if not packed:
        short = copy_with(source, tmp_path / "short", lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
        with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj is \(63, 64\), and \(64, 64\)"):
            qdora.load_model(short)


def test_a_stack_of_more_experts_than_the_config_says(mixture: Path, tmp_path: Path) -> None:
    def with_one_more(tensors: dict[str, torch.Tensor]) -> None:
        stack(tensors)
        for key in [key for key in tensors if key.endswith("experts.down_proj")]:
            tensors[key] = torch.cat([tensors[key], tensors[key][:1]])

    odd = copy_with(mixture, tmp_path / "odd", with_one_more)
    with pytest.raises(CheckpointError, match=r"\.0\.mlp\.experts\.down_proj is \(5, 64, 64\), and \(4, 64, 64\) by"):
        qdora.load_model(odd)


def test_names_in_files(mixture: Path) -> None:
    names = key_names(qdora.load_model(mixture))
    assert "model.layers.0.x" in list(names.candidates("layers.0.x"))
    config = NF4Config(bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    told = NF4Config.of_checkpoint(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict())
    assert told["quant_method"] == config.quant_method
    assert not any("load_in" in name for name in told)


def test_experts_have_adapters_only_if_they_are_named(mixture_nf4: Path) -> None:
    def adapted(*names: str) -> set[str]:
        model = qdora.load_model(mixture_nf4, adapter=AdapterConfig(rank=2, target_modules=names))
        return {path.removeprefix("model.layers.0.") for path in adapted_linears(model) if ".layers.0." in path}

    downs = {f"mlp.experts.{number}.down_proj" for number in range(4)}
    assert adapted("q_proj", "experts.down_proj") == {"self_attn.q_proj"} | downs
    assert len(adapted("experts")) == 12
    assert adapted("mlp.experts.down_proj") == downs
    with pytest.raises(ConfigError, match="'up_proj' matches no linear"):
        adapted("q_proj", "up_proj")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("use_dora", [True, False])
def test_adapters_on_experts_merge_and_peft_reads_them(name: str, use_dora: bool, tmp_path: Path) -> None:
    source = make_family(name, tmp_path / "source")
    config = AdapterConfig(rank=2, alpha=4, use_dora=use_dora, target_modules=("o_proj", "experts"), dtype="float32")
    model = qdora.load_model(source, adapter=config, dtype="float32", load_in_4bit=False)
    disturb(model)
    expected = logits(model)
    qdora.save_adapter(model, tmp_path / "adapter")
    again = qdora.load_model(source, adapter=tmp_path / "adapter", dtype="float32", load_in_4bit=False)
    assert torch.equal(logits(again), expected)
    assert error(logits(qdora.load_model(source, dtype="float32", load_in_4bit=False)), expected) > 0.05

    qdora.merge(source, tmp_path / "adapter", tmp_path / "merged", verify=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert error(logits(merged), expected) < 2e-3

    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if use_dora:  # PEFT has DoRA for linears, not for stacked parameters
        with pytest.raises(ValueError, match="use_dora"):
            PeftModel.from_pretrained(plain, tmp_path / "adapter")
    else:
        assert error(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()), expected) < 1e-4
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(raw["target_modules"]) == 4
