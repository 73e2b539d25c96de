"""Linears whose weight the model takes for itself get no adapter and stay in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import qdora
from qdora import AdapterConfig
from qdora.bypassed import bypassed_paths, shared_paths
from qdora.inject import adapted_linears, linear_paths
from qdora.nf4 import is_packed_linear
from tests.conftest import disturb, make_tokenizer
from tests.families import FAMILIES


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) @ self.outer.weight + self.norm.weight


class Heir(Mixer):
    """Inherits what reads it."""


class Sliced(Mixer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pretraining_tp = 1
        return self.inner(x) if pretraining_tp == 1 else x @ self.inner.weight[:2].t()


def test_what_the_code_of_a_module_reads() -> None:
    model = nn.ModuleDict({"a": Mixer(), "b": nn.Sequential(Heir()), "c": nn.Linear(4, 4)})
    assert bypassed_paths(model) == ["a.outer", "b.0.outer"]
    assert linear_paths(model) == ["a.inner", "b.0.inner", "c"]
    assert bypassed_paths(Mixer()) == ["outer"]
    # Its parent reads another one; how pretraining sliced weights does not count.
    assert bypassed_paths(Sliced()) == ["outer"]


def test_linears_that_share_their_weight() -> None:
    settings = {**FAMILIES["zamba2"], "hidden_size": 64, "intermediate_size": 64, "vocab_size": 99}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("zamba2", **settings, num_attention_heads=4))
        tied = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", tie_word_embeddings=True))
    shared = shared_paths(model)
    assert {path.split(".")[2] for path in shared} == {"1", "3"}
    assert {path.split(".")[3] for path in shared} == {"shared_transformer"}
    assert not set(shared) & set(linear_paths(model))
    assert shared_paths(tied) == []
    assert shared_paths(Mixer()) == []


def test_a_class_without_a_source() -> None:
    made: Any = type("Made", (nn.Module,), {"__module__": "nowhere"})()
    made.inner = nn.Linear(4, 4)
    assert bypassed_paths(made) == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", set()),
        ("bloom", set()),
        ("qwen3_next", set()),
        ("mamba", {"dt_proj", "out_proj", "x_proj"}),
        ("nemotron_h", {"out_proj"}),
        ("deepseek_v32", {"weights_proj"}),
        ("rwkv", {"output", "value"}),
    ],
)
def test_in_real_families(kind: str, expected: set[str]) -> None:
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    inner = [path for path in bypassed_paths(model) if not path.endswith("lm_head")]
    assert {path.rpartition(".")[2] for path in inner} == expected
    assert not {*linear_paths(model)} & {*inner}


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_one_that_somebody_quantized_is_dense_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {**FAMILIES["mamba"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings)).save_pretrained(tmp_path / "dense")
    in_nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head"],
        bnb_4bit_compute_dtype="float32",
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=in_nf4)
    theirs.save_pretrained(tmp_path / "nf4")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    packed = {path: module for path, module in theirs.named_modules() if is_packed_linear(module)}
    assert {path.rpartition(".")[2] for path in packed} == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    for path, module in packed.items():
        values = dequantize_4bit(module.weight, module.weight.quant_state)
        twin.get_submodule(path).weight.data.copy_(values)
    ours = qdora.load_model(tmp_path / "nf4", AdapterConfig(rank=2), dtype="float32")
    assert {path.rpartition(".")[2] for path in adapted_linears(ours)} == {"in_proj"}
    ids = torch.arange(40)[None]
    torch.testing.assert_close(ours(input_ids=ids).logits, twin(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_rwkv_runs_in_nf4_and_merged(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        "rwkv",
        hidden_size=64,
        num_hidden_layers=2,
        attention_hidden_size=64,
        context_length=256,
        rescale_every=1,
        vocab_size=len(tokenizer),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    qdora.quantize(tmp_path / "base", tmp_path / "nf4")
    model = qdora.load_model(tmp_path / "nf4", AdapterConfig(rank=2), dtype="float32")
    names = {path.rpartition(".blocks.")[2][2:] for path in adapted_linears(model)}
    assert names == {
        "attention.key",
        "attention.receptance",
        "attention.value",
        "feed_forward.key",
        "feed_forward.receptance",
    }
    disturb(model)
    ids = torch.arange(40)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.lora_A.grad.any() for layer in adapted_linears(model).values())
    qdora.save_adapter(model, tmp_path / "adapter")
    qdora.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (one.eval()(input_ids=ids).logits for one in (model, plain))
    assert (ours - theirs).norm() / ours.norm() < 2e-2
