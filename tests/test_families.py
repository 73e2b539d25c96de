"""Every family from 16-bit files to a merged model in plain transformers, tiny and random, through the verbs.

`pytest tests/test_families.py -s` prints the README's table.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, set_seed

import qdora
from qdora.dora import DoRALinear
from qdora.experts import RoutedExperts
from qdora.inject import adapted_linears, linear_paths
from qdora.nf4 import NF4Weight
from qdora.shards import ShardReader
from tests.conftest import disturb
from tests.families import FAMILIES, HYBRIDS, MIXTURES, SEEING, make_family
from tests.test_train import adapter_tensors, quick

IDS = torch.arange(3, 43)[None]
ADAPTER = qdora.AdapterConfig(rank=4, alpha=8)
# Of these tiny models, whose embeddings are large for their size.
SHARE_IN_NF4 = {
    "mistral": 0.59,
    "qwen2": 0.74,
    "qwen3": 0.66,
    "gemma2": 0.79,
    "gemma3_text": 0.79,
    "phi": 0.52,
    "phi3": 0.59,
    "falcon": 0.77,
    "gpt2": 0.69,
    "granitemoehybrid": 0.57,
    "bamba": 0.57,
    "falcon_h1": 0.61,
    "mamba": 0.39,
    "mamba2": 0.34,
    "zamba2": 0.35,
    "mixtral": 0.81,
    "qwen2_moe": 0.74,
    "qwen3_moe": 0.74,
    "olmoe": 0.81,
    "deepseek_v3": 0.72,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_from_16_bits_to_a_merged_model(name: str, pairs_file: Path, tmp_path: Path) -> None:
    source, base, adapter, merged = (tmp_path / part for part in ("source", "base", "adapter", "merged"))
    make_family(name, source)
    quantized = qdora.quantize(source, base)
    assert quantized.share_in_nf4 == pytest.approx(SHARE_IN_NF4[name], abs=0.006)
    assert f"{100 * quantized.share_in_nf4:.0f} % of the weights, in NF4" in str(quantized)
    assert not quantized.kept_experts

    quick(base, pairs_file, adapter, max_steps=3, per_device_train_batch_size=2)
    trained = qdora.load_model(base, adapter=adapter, dtype="float32")
    set_seed(42)  # the trainer's own
    fresh = adapted_linears(qdora.load_model(base, adapter=ADAPTER))
    layers = adapted_linears(trained)
    assert layers.keys() == fresh.keys() == {path for path in linear_paths(trained) if ".experts." not in path}
    for path, layer in layers.items():
        assert not torch.equal(layer.lora_A, fresh[path].lora_A), path
        assert layer.lora_B.any(), path
        assert layer.magnitude_offset.any(), path

    qdora.merge(base, adapter, merged, verify=False)
    assert set(ShardReader(merged)) == set(ShardReader(source))
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    # A router near a tie may send a token to another expert after any rounding; not in most of eight texts.
    texts = IDS.view(8, 5) if name in MIXTURES else IDS
    with torch.no_grad():
        expected, found = (model(texts).logits.flatten(1) for model in (trained, plain))
    error = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).median())
    assert error < 2e-3
    print(f"\n| {name} | {100 * quantized.share_in_nf4:.0f} % | {len(layers)} | {error:.1e} |")


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi", "phi3"])
def test_plain_transformers_reads_the_nf4_checkpoint_of_dense_families(name: str, tmp_path: Path) -> None:
    qdora.quantize(make_family(name, tmp_path / "source"), tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).train()
    ours = qdora.load_model(tmp_path / "base").train()
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    # Where there are biases, bitsandbytes rounds once after adding them.
    expected, found = plain(IDS).logits.detach().float(), ours(IDS).logits.detach().float()
    assert float((found - expected).norm() / expected.norm()) < 1.5e-2


def test_linears_of_another_class_are_quantized_as_they_load(tmp_path: Path) -> None:
    """transformers leaves a Falcon's in 16 bits, whatever it was asked for."""
    source, base = make_family("falcon", tmp_path / "source"), tmp_path / "base"
    qdora.quantize(source, base)
    as_it_loads, packed = (qdora.load_model(path, adapter=ADAPTER) for path in (source, base))
    for model in (as_it_loads, packed):
        layers = adapted_linears(model).values()
        assert len(layers) == 8
        assert all(isinstance(layer.base, NF4Weight) for layer in layers)
    assert torch.equal(as_it_loads(IDS).logits, packed(IDS).logits)


@pytest.mark.parametrize("name", [*HYBRIDS, *SEEING])
def test_a_16_bit_model_is_its_nf4_checkpoint_when_it_loads(name: str, tmp_path: Path) -> None:
    source, base, adapter = make_family(name, tmp_path / "source"), tmp_path / "base", tmp_path / "adapter"
    qdora.quantize(source, base)
    as_it_loads, packed = (qdora.load_model(path, dtype="float32") for path in (source, base))
    assert torch.equal(as_it_loads(IDS).logits, packed(IDS).logits)
    model = qdora.load_model(source, adapter=ADAPTER)
    assert not [path for path in adapted_linears(model) if "vision" in path]  # which text would not train
    disturb(model)
    qdora.save_adapter(model, adapter)
    assert adapted_linears(qdora.load_model(base, adapter=adapter)).keys() == adapted_linears(model).keys()
    for start in (source, base):
        report = qdora.merge(start, adapter, tmp_path / "merged", overwrite=True)
        assert report.comparison is not None
        assert report.comparison.kl_per_token < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float16}


def test_what_chooses_experts_keeps_its_bits(tmp_path: Path) -> None:
    """With biases near 20 bf16 would make them all alike."""
    source, base, adapter = make_family("deepseek_v3", tmp_path / "source"), tmp_path / "base", tmp_path / "adapter"
    tensors = load_file(source / "model.safetensors")
    (name,) = [key for key in tensors if key.endswith("e_score_correction_bias")]
    tensors[name] = torch.tensor([20.038, 20.014, 20.020, 20.037])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    qdora.quantize(source, base)
    as_it_loads, packed = (qdora.load_model(path, adapter=ADAPTER, dtype="float32") for path in (source, base))
    assert torch.equal(as_it_loads(IDS).logits, packed(IDS).logits)
    disturb(packed)
    qdora.save_adapter(packed, adapter)
    qdora.merge(base, adapter, tmp_path / "merged")
    for directory in (base, tmp_path / "merged"):
        assert torch.equal(ShardReader(directory).get(name), tensors[name])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain.get_parameter_or_buffer(name), tensors[name])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_beyond_float16_is_said(name: str, tmp_path: Path) -> None:
    """Its key is none of the model's, whose experts are stacked."""
    source, adapter = make_family(name, tmp_path / "source"), tmp_path / "adapter"
    tensors = load_file(source / "model.safetensors")
    key = next(key for key in tensors if ".experts.1." in key)
    tensors[key][0, 0] = 70_000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = qdora.load_model(source, adapter=ADAPTER, load_in_4bit=False)
    qdora.save_adapter(model, adapter)
    with pytest.raises(qdora.NumericsError, match="is not finite in float16"):
        qdora.merge(source, adapter, tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_streamed_experts_train_to_the_same_bits(name: str, pairs_file: Path, tmp_path: Path) -> None:
    """With adapters on experts too; and a 16-bit model that is quantized as it loads is the NF4 checkpoint."""
    source, base = make_family(name, tmp_path / "source"), tmp_path / "base"
    qdora.quantize(source, base)
    targets = {"lora_target_modules": ["experts", "o_proj"], "max_steps": 2, "per_device_train_batch_size": 2}
    quick(base, pairs_file, tmp_path / "resident", **targets)
    quick(source, pairs_file, tmp_path / "streamed", stream_base=True, **targets)
    resident, streamed = adapter_tensors(tmp_path / "resident"), adapter_tensors(tmp_path / "streamed")
    assert any(".experts.0." in key for key in resident)
    assert resident.keys() == streamed.keys()
    for key, value in resident.items():
        assert torch.equal(value, streamed[key]), key


def test_all_linear_leaves_experts_and_routers_alone(tmp_path: Path) -> None:
    qdora.quantize(make_family("qwen2_moe", tmp_path / "source"), tmp_path / "base")
    model = qdora.load_model(tmp_path / "base", adapter=ADAPTER, dtype="bfloat16")
    names = {path.rpartition("layers.0.")[2] for path in adapted_linears(model) if "layers.0." in path}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert names == attention | {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    block = model.model.layers[0].mlp
    assert isinstance(block.experts, RoutedExperts)
    assert all(isinstance(block.experts.get_submodule(f"{n}.up_proj").base, NF4Weight) for n in range(4))
    assert block.gate.weight.dtype == block.shared_expert_gate.weight.dtype == torch.bfloat16
    assert not any(isinstance(module, DoRALinear) for module in block.experts.modules())


@pytest.mark.parametrize("name", MIXTURES)
def test_plain_transformers_never_runs_packed_experts(name: str, tmp_path: Path) -> None:
    qdora.quantize(make_family(name, tmp_path / "source"), tmp_path / "base")
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)(IDS)
