"""Loading: what is frozen and how, and what is refused because transformers would only warn of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, MambaConfig

import qdora
from qdora import AdapterConfig, CheckpointError, arithmetic
from qdora.adapterfile import WEIGHTS_FILE
from qdora.architecture import is_nf4_checkpoint
from qdora.dense import DenseWeight
from qdora.inject import adapted_linears
from qdora.model import load_to_answer, trainable_parameters
from qdora.nf4 import NF4Weight
from qdora.scoring import ScoredModel
from tests.conftest import make_model
from tests.memory import peak_of
from tests.mutate import CANARY_CODE

IDS = torch.arange(3, 43)[None]


def test_what_trains_and_what_does_not(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    layers = adapted_linears(model)
    assert len(layers) == 14
    assert all(isinstance(layer.base, NF4Weight) for layer in layers.values())
    trained = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"lora_A", "lora_B", "magnitude_offset"}
    expected = sum(4 * (d.in_features + d.out_features) + d.out_features for d in layers.values())
    assert trainable_parameters(model) == expected
    assert not any(value.requires_grad for value in qdora.load_model(tiny_nf4).parameters())


def test_a_16_bit_model_is_quantized_as_it_loads_or_left(tiny: Path, tiny_nf4: Path) -> None:
    quantized, packed = qdora.load_model(tiny), qdora.load_model(tiny_nf4)
    assert torch.equal(quantized(IDS).logits, packed(IDS).logits)
    dense = qdora.load_model(tiny, adapter=AdapterConfig(rank=4), dtype="bfloat16", load_in_4bit=False)
    assert all(isinstance(layer.base, DenseWeight) for layer in adapted_linears(dense).values())
    assert torch.equal(dense(IDS).logits, AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)(IDS).logits)


def test_what_decides_on_four_bits(tiny: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    def trained_on(kind: str) -> Path:
        out = tmp_path / kind
        shutil.copytree(tiny_adapter, out)
        with safe_open(out / WEIGHTS_FILE, framework="pt") as file:
            metadata = file.metadata()
        save_file(load_file(out / WEIGHTS_FILE), out / WEIGHTS_FILE, metadata | {"qdora_base": kind})
        return out

    def said(path: Path, adapter: Path | None, **settings: bool) -> str:
        model, weights = load_to_answer(path, adapter, **settings)
        packed = any(isinstance(module, NF4Weight) for module in model.modules())
        assert packed == ("NF4" in weights)
        assert not model.training
        return weights

    packed, rounded, dense = "NF4 weights", "rounded to NF4 as it was loaded", "16-bit weights"
    on_dense, on_custom = trained_on("dense"), trained_on("nf4-custom")
    assert [said(tiny, adapter) for adapter in (None, tiny_adapter, on_dense)] == [dense, rounded, dense]
    assert [said(tiny_nf4, adapter) for adapter in (None, tiny_adapter, on_dense, on_custom)] == [packed] * 4
    assert [said(tiny, tiny_adapter, load_in_4bit=asked) for asked in (True, False)] == [rounded, dense]
    assert [said(tiny, on_custom, load_in_4bit=asked) for asked in (True, False)] == [rounded, dense]
    with pytest.raises(CheckpointError, match=r"model is 16-bit; name the .*nf4\), or choose by --load_in_4bit$"):
        load_to_answer(tiny, on_custom)


def test_arithmetic_in_fp32_means_the_same_nf4_weights(tmp_path: Path) -> None:
    """Of a model whose weights bf16 does not hold, too; what is not quantized keeps their digits."""
    make_model(tmp_path / "m")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.mul_(1 + 2**-12)
    exact.save_pretrained(tmp_path / "m")
    qdora.quantize(tmp_path / "m", tmp_path / "nf4")
    on_the_fly, packed = (qdora.load_model(tmp_path / name, AdapterConfig(), dtype="float32") for name in ("m", "nf4"))
    for path, layer in adapted_linears(packed).items():
        assert torch.equal(adapted_linears(on_the_fly)[path].base.dequantize(), layer.base.dequantize()), path
    assert torch.equal(on_the_fly.get_input_embeddings().weight, exact.get_input_embeddings().weight)


def test_a_cpu_that_is_slow_in_bfloat16_computes_in_fp32(tiny_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda _, fast=fast: fast)
        assert qdora.load_model(tiny_nf4, device="cpu").dtype == dtype
        assert qdora.load_model(tiny_nf4, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_do_not_fit_the_config(damage: str, tmp_path: Path) -> None:
    """transformers fills them with random values and warns."""
    model = make_model(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:-64].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not hold the model|up_proj is \(128, 64\), and \(192, 64\)"):
        qdora.load_model(model)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        qdora.quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_quantizations_are_refused(tiny: Path, tmp_path: Path) -> None:
    for quantization, kind in [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    ]:
        model = tmp_path / kind
        shutil.copytree(tiny, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        for act in (qdora.load_model, is_nf4_checkpoint):
            with pytest.raises(CheckpointError, match=f"quantized as '?{kind}"):
                act(model)


@pytest.mark.parametrize("kind", ["plain", "capped", "scaled"])
def test_a_head_that_does_more_is_scored_by_the_model(kind: str, tmp_path: Path, tokenizer: object) -> None:
    """The lean loss multiplies by the head's weight; Gemma 2 caps the logits after it and Cohere scales them."""
    from datasets import Dataset
    from trl import SFTConfig

    from qdora.trainer import AdapterTrainer

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "vocab_size": 400, "pad_token_id": 0, "head_dim": 32}
    torch.manual_seed(0)
    if kind == "plain":
        path = make_model(tmp_path / "m")
    else:
        config = (
            Gemma2Config(**shape, final_logit_softcapping=2.0, initializer_range=0.3)
            if kind == "capped"
            else Cohere2Config(**shape, logit_scale=0.25, initializer_range=0.3)
        )
        path = tmp_path / "m"
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    model = qdora.load_model(path, adapter=AdapterConfig(rank=2), dtype="float32")
    data = Dataset.from_dict({"input_ids": [list(range(3, 20))], "labels": [[-100] * 4 + list(range(7, 20))]})
    trainer = AdapterTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "o"),
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = {"input_ids": torch.tensor(data["input_ids"]), "labels": torch.tensor(data["labels"])}
    model.eval()
    logits = model(input_ids=batch["input_ids"]).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    assert trainer._head_is_plain is (kind == "plain")
    assert float(trainer.compute_loss(model, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_loading_takes_the_checkpoint_s_size_and_no_more(tmp_path: Path, tiny_nf4: Path) -> None:
    """In host memory, of which a GPU's load needs even less: no second copy, nothing upcast on the way."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    source, packed = make_model(tmp_path / "wide", **wide), tmp_path / "nf4"
    qdora.quantize(source, packed)
    size = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    peak = peak_of(
        work=f"model = qdora.load_model({str(packed)!r}, device='cpu')",
        warm_up=f"import qdora; qdora.load_model({str(tiny_nf4)!r}, device='cpu')",
    )
    largest = 1024 * 4096 // 2
    assert size > 25e6
    assert peak < size + largest + 8e6
    assert size < 0.3 * sum(path.stat().st_size for path in source.glob("*.safetensors"))


def test_what_is_not_quantized_stays_in_16_bits(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, dtype="bfloat16", device="cpu", adapter=qdora.AdapterConfig(rank=2))
    for name, parameter in model.named_parameters():
        assert parameter.dtype in (torch.bfloat16, torch.uint8), name


@pytest.mark.parametrize("where", ["evil.Evil", "owner/name--evil.Evil"])
def test_code_of_a_model_is_not_run_unasked(
    where: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, canary = shutil.copytree(tiny, tmp_path / "evil"), tmp_path / "canary"
    (directory / "evil.py").write_text(CANARY_CODE.format(path=str(canary)))
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": where, "AutoModelForCausalLM": where}}
    (directory / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(CheckpointError, match="code of its own, which runs only with --trust_remote_code"):
        qdora.load_model(directory)
    assert not canary.exists()


def test_an_adapter_beside_a_model_is_not_loaded_with_it(tiny: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny, tmp_path / "both")
    shutil.copy(tiny_adapter / "adapter_config.json", directory)
    with pytest.raises(CheckpointError, match=r"an adapter .* beside the model"):
        qdora.load_model(directory)


def test_a_head_whose_input_is_rounded_is_not_plain(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    config = MambaConfig(**sizes, residual_in_fp32=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    assert not ScoredModel(model).head_is_plain()
    assert model.training
