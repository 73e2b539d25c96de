"""The NF4 checkpoint: right values, read by plain transformers, memory bounded by a shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

import qdora
from qdora.errors import CheckpointError, ConfigError, NumericsError
from qdora.inject import linear_paths
from qdora.shards import ShardReader
from tests.conftest import make_model, make_tokenizer
from tests.memory import peak_of

IDS = torch.arange(3, 23)[None]


def test_plain_transformers_computes_the_same(tiny_nf4: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_nf4, dtype=torch.bfloat16).train()
    ours = qdora.load_model(tiny_nf4, dtype="bfloat16")
    assert torch.equal(plain(IDS).logits, ours(IDS).logits)


def test_only_the_decoder_is_quantized(tiny: Path, tiny_nf4: Path) -> None:
    before, after = ShardReader(tiny), ShardReader(tiny_nf4)
    for key in before:
        if key.endswith("proj.weight"):
            assert after.get(key).dtype == torch.uint8
            assert f"{key}.nested_absmax" in after
        else:
            assert torch.equal(after.get(key), before.get(key))
    assert len({key.partition(".weight")[0] for key in after}) == len(before.keys())


def test_the_report_and_what_comes_along(tiny: Path, tmp_path: Path) -> None:
    GenerationConfig(max_new_tokens=7).save_pretrained(tiny)
    report = qdora.quantize(tiny, tmp_path / "out", max_shard_size="20KB")
    assert 4.1 < report.bits_per_weight < 6  # tiny weights carry tables of a fixed size
    assert len(report.errors) == 14
    assert all(0.05 < error < 0.15 for error in report.errors.values())
    assert "bits per weight" in str(report)
    assert report.bytes_after == ShardReader(tmp_path / "out").total_bytes
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_options(tiny: Path, tmp_path: Path) -> None:
    report = qdora.quantize(tiny, tmp_path / "a", skip_modules=["down_proj"], double_quant=False, dtype="float16")
    assert len(report.errors) == 12
    assert len(report.kept_linears) == 2
    reader = ShardReader(tmp_path / "a")
    assert reader.get("model.layers.0.mlp.down_proj.weight").dtype == torch.float16
    assert reader.get("model.layers.0.mlp.up_proj.weight.absmax").dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float16).train()
    ours = qdora.load_model(tmp_path / "a", dtype="float16")
    assert torch.equal(plain(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("key", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_what_float16_cannot_hold_is_named(key: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    tensors[key].view(-1)[3] = 1e5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        NumericsError, match=rf"^{key} is not finite in float16 .* value is 9\.984e\+04\); pass --dtype"
    ):
        qdora.quantize(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    if "proj" in key:
        path = key.removesuffix(".weight")
        with pytest.raises(NumericsError, match=rf"of {path} holds 9\.984e\+04, beyond NF4's 65504; .*modules {path}$"):
            qdora.quantize(model, tmp_path / "out")
        qdora.quantize(model, tmp_path / "out", skip_modules=[path])
    else:
        qdora.quantize(model, tmp_path / "out")


def test_an_untied_head_stays(tmp_path: Path) -> None:
    qdora.quantize(make_model(tmp_path / "m", tie=False), tmp_path / "out")
    assert ShardReader(tmp_path / "out").get("lm_head.weight").dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).train()
    assert torch.equal(plain(IDS).logits, qdora.load_model(tmp_path / "out", dtype="bfloat16")(IDS).logits)


def test_quantizing_as_it_loads_is_quantizing_first(tiny: Path, tiny_nf4: Path) -> None:
    assert torch.equal(qdora.load_model(tiny)(IDS).logits, qdora.load_model(tiny_nf4)(IDS).logits)


def make_gpt2(directory: Path) -> Path:
    tokenizer = make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_gpt2_with_its_transposed_weights(tmp_path: Path) -> None:
    source = make_gpt2(tmp_path / "gpt2")
    report = qdora.quantize(source, tmp_path / "out")
    assert len(report.errors) == 8
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).train()
    ours = qdora.load_model(tmp_path / "out", dtype="bfloat16").train()
    assert set(linear_paths(ours)) == set(report.errors)
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert torch.equal(plain(IDS).logits, ours(IDS).logits)
    error = (ours(IDS).logits - dense(IDS).logits).norm() / dense(IDS).logits.norm()
    assert error < 0.3


def test_refusals(tiny: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for model, message in [
        (tmp_path / "absent", "no model at"),
        (tmp_path, "has no config.json"),
        (tiny_nf4, "in NF4 already"),
        (tiny_adapter, "is an adapter, not a model"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            qdora.quantize(model, out)
    for options, message in [
        ({"skip_modules": ["typo_proj"]}, "'typo_proj'"),
        ({"skip_modules": ["(.+)+$x"]}, r"more of an expression than config\.json may hold: three repetitions at most"),
        ({"max_shard_size": "big"}, "not a size"),
        ({"dtype": "int8"}, "int8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            qdora.quantize(tiny, out, **options)  # type: ignore[arg-type]
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00garbage")
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        qdora.quantize(tmp_path / "bad.gguf", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """420 MB in shards of 100 MB; the largest tensor has 6 MB."""
    return make_model(
        tmp_path_factory.mktemp("big") / "model",
        shard="100MB",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


BOUND = 100_000_000
SMALL_SHARDS = "max_shard_size='20MB', overwrite=True"


def test_memory_is_bounded_by_a_shard(sharded: Path, tiny: Path, tmp_path: Path) -> None:
    assert ShardReader(sharded).total_bytes > 4 * BOUND
    warm_up = f"import qdora; qdora.quantize({str(tiny)!r}, {str(tmp_path / 'warm')!r}, overwrite=True)"
    out = str(tmp_path / "nf4")
    assert peak_of(f"qdora.quantize({str(sharded)!r}, {out!r}, {SMALL_SHARDS})", warm_up) < BOUND

    model = qdora.load_model(out, adapter=qdora.AdapterConfig(rank=4))
    qdora.save_adapter(model, tmp_path / "adapter")
    del model
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    merge = f"qdora.merge({out!r}, {adapter!r}, {merged!r}, verify=False, {SMALL_SHARDS})"
    assert peak_of(merge, f"{warm_up}; qdora.load_model({str(tiny)!r})") < BOUND
    assert ShardReader(tmp_path / "merged").total_bytes > 4 * BOUND


def test_what_the_model_does_not_read_may_be_infinite(tiny_adapter: Path, tmp_path: Path) -> None:
    """Files of GPT-NeoX hold a causal mask beside their weights."""
    source, name = make_model(tmp_path / "m"), "model.layers.0.self_attn.masked_bias"
    tensors = load_file(source / "model.safetensors")
    mask = torch.tensor(-torch.inf, dtype=torch.float16)
    save_file({**tensors, name: mask}, source / "model.safetensors", metadata={"format": "pt"})
    qdora.quantize(source, tmp_path / "base", dtype="float16")
    qdora.merge(tmp_path / "base", tiny_adapter, tmp_path / "out", verify=False, allow_other_base=True)
    for directory in (tmp_path / "base", tmp_path / "out"):
        assert torch.equal(ShardReader(directory).get(name), mask)


def test_a_log_has_no_bars(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qdora.quantize(tiny, tmp_path / "out")
    assert "\r" not in capfd.readouterr().err
