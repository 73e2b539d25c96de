"""The merged model against the equation in fp64, against its adapter, and as plain transformers reads it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

import qdora
from qdora import AdapterConfig, CheckpointError, ConfigError, NumericsError
from qdora.adapterfile import read_adapter
from qdora.config import ends_in
from qdora.inject import linear_paths
from qdora.shards import ShardReader
from qdora.tokenizer import template_beside, tokenizer_of
from qdora.verbs.merge import _special_ids
from qdora.verify import compare
from qdora.whole import trained_whole
from tests.conftest import disturb, make_model, make_tokenizer
from tests.families import make_family
from tests.reference import dora as reference
from tests.test_quantize import make_gpt2

IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("use_dora", [True, False])
def test_every_weight_is_the_equation_s(use_dora: bool, tmp_path: Path) -> None:
    base = make_model(tmp_path / "m", intermediate_size=144)  # in_features that straddle blocks
    qdora.quantize(base, tmp_path / "nf4")
    model = qdora.load_model(tmp_path / "nf4", adapter=AdapterConfig(rank=4, use_dora=use_dora))
    disturb(model)
    qdora.save_adapter(model, tmp_path / "adapter")
    qdora.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out", verify=False, max_shard_size="30KB")
    merged, adapter = ShardReader(tmp_path / "out"), read_adapter(tmp_path / "adapter")
    for path in linear_paths(model):
        layer, parts = model.get_submodule(path), adapter.linears[path]
        W, A, B = layer.base.dequantize().double(), parts.A.double(), parts.B.double()
        m = None if parts.magnitude is None else parts.magnitude.double()
        expected = reference.forward(torch.eye(W.shape[1]).double(), W, A, B, m, parts.scaling).t()
        ours = merged.get(f"{path}.weight")
        assert ours.dtype == torch.float16
        assert ((ours.double() - expected).abs() <= 2**-11 * expected.abs() + 2**-24).all()


def test_the_merged_model_is_plain_and_agrees(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    report = qdora.merge(tiny_nf4, tiny_adapter, tmp_path / "out")
    assert report.comparison is not None
    assert report.comparison.kl_per_token < 1e-4
    assert report.merged_linears == 14
    assert "14 linears merged onto the nf4 base" in str(report)
    assert "greedy tokens the same" in str(report)
    record = json.loads((tmp_path / "out" / "qdora_merge.json").read_text())
    assert (record["merged_onto"], record["dtype"]) == ("nf4", "float16")
    assert record["verified"]["kl_per_token"] < 1e-4

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.float16
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    trained = qdora.load_model(tiny_nf4, adapter=tiny_adapter, dtype="float32")
    a, b = trained(IDS).logits, plain.float()(IDS).logits
    assert (a - b).norm() / a.norm() < 2e-3


def test_bfloat16_and_an_untied_head(tmp_path: Path) -> None:
    qdora.quantize(make_model(tmp_path / "m", tie=False), tmp_path / "nf4")
    model = qdora.load_model(tmp_path / "nf4", adapter=AdapterConfig(rank=4))
    qdora.save_adapter(model, tmp_path / "adapter")
    qdora.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight


def test_a_head_that_another_tool_packed(tmp_path: Path) -> None:
    source = make_model(tmp_path / "m", tie=False)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["none"])
    packed = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "nf4")
    make_tokenizer().save_pretrained(tmp_path / "nf4")
    assert ShardReader(tmp_path / "nf4").get("lm_head.weight").dtype == torch.uint8
    model = qdora.load_model(tmp_path / "nf4", adapter=AdapterConfig(rank=4))
    disturb(model)
    assert isinstance(model.lm_head, torch.nn.Linear)
    qdora.save_adapter(model, tmp_path / "adapter")
    report = qdora.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out")
    assert report.comparison is not None
    assert report.comparison.kl_per_token < 1e-4


@pytest.mark.parametrize("name", ["o_proj", "c_proj"])
def test_a_linear_that_was_trained_whole(name: str, tiny: Path, tmp_path: Path) -> None:
    base = tiny if name == "o_proj" else make_gpt2(tmp_path / "gpt2")
    adapted = "q_proj" if name == "o_proj" else "c_attn"
    config = AdapterConfig(rank=4, target_modules=(adapted,), modules_to_save=(name,))
    model = qdora.load_model(base, adapter=config, load_in_4bit=False)
    disturb(model)
    with torch.no_grad():
        for path, module in trained_whole(model).items():
            assert ends_in(path, name)
            module.trained.weight += 0.1 * torch.randn_like(module.trained.weight)
    qdora.save_adapter(model, tmp_path / "adapter")
    report = qdora.merge(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert report.comparison is not None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for path, module in trained_whole(model).items():
        assert torch.equal(plain.get_submodule(path).weight, module.trained.weight.bfloat16())


def with_whole(base: Path, out: Path, name: str, stays_tied: bool = False) -> Path:
    """An adapter to this base beside which a module, embedding or head, was trained whole."""
    config = AdapterConfig(rank=4, modules_to_save=(name,), ensure_weight_tying=stays_tied)
    model = qdora.load_model(base, adapter=config, load_in_4bit=False)
    disturb(model)
    with torch.no_grad():
        for module in trained_whole(model).values():
            module.trained.weight += 0.1 * torch.randn_like(module.trained.weight)
    qdora.save_adapter(model, out)
    return out


@pytest.mark.parametrize("name", ["embed_in", "lm_head"])
def test_a_head_of_another_name_in_its_files_is_written_once(name: str, tmp_path: Path) -> None:
    base = make_family("gpt_neox", tmp_path / "base", tie_word_embeddings=False)
    assert "embed_out.weight" in ShardReader(base)
    report = qdora.merge(base, with_whole(base, tmp_path / "adapter", name), tmp_path / "out", dtype="bfloat16")
    assert report.comparison is not None
    assert set(ShardReader(tmp_path / "out")) == set(ShardReader(base))


@pytest.mark.parametrize(("name", "stays_tied"), [("embed_tokens", False), ("lm_head", False), ("lm_head", True)])
def test_a_tied_base_that_is_stored_under_the_head_s_name(name: str, stays_tied: bool, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = with_whole(base, tmp_path / "adapter", name, stays_tied)
    qdora.merge(base, adapter, tmp_path / "usual")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    qdora.merge(base, adapter, tmp_path / "out", verify=False, allow_other_base=True)
    usual, ours = ShardReader(tmp_path / "usual"), ShardReader(tmp_path / "out")
    assert set(usual) ^ set(ours) == ({"model.embed_tokens.weight", "lm_head.weight"} if stays_tied else set())
    assert all(torch.equal(usual.get(key), ours.get(key if key in ours else "lm_head.weight")) for key in usual)


def test_gpt2_keeps_its_orientation(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "gpt2")
    qdora.quantize(base, tmp_path / "nf4")
    for source in (tmp_path / "nf4", base):
        model = qdora.load_model(source, adapter=AdapterConfig(rank=4))
        disturb(model)
        out = tmp_path / f"out-{source.name}"
        qdora.save_adapter(model, out / "adapter")
        report = qdora.merge(source, out / "adapter", out / "merged", verify=True)
        assert report.comparison is not None
        assert report.comparison.kl_per_token < 1e-4


def test_a_16_bit_base_is_rounded_as_training_rounded_it(
    tiny: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    through = qdora.merge(tiny, tiny_adapter, tmp_path / "through")
    assert through.base == "16-bit rounded through nf4"
    assert through.comparison is not None
    assert through.comparison.kl_per_token < 1e-4
    qdora.merge(tiny_nf4, tiny_adapter, tmp_path / "nf4")
    a, b = ShardReader(tmp_path / "through"), ShardReader(tmp_path / "nf4")
    assert all(torch.equal(a.get(key), b.get(key)) for key in b)
    onto = qdora.merge(tiny, tiny_adapter, tmp_path / "onto", onto_original=True)
    assert onto.base == "16-bit"
    assert onto.comparison is not None
    assert onto.comparison.kl_per_token < 1e-4
    key = "model.layers.0.mlp.up_proj.weight"
    difference = ShardReader(tmp_path / "onto").get(key).float() - b.get(key).float()
    assert 0.05 < difference.norm() / b.get(key).float().norm() < 0.15


def test_an_adapter_trained_on_a_dense_base(tiny: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny, adapter=AdapterConfig(rank=4), load_in_4bit=False)
    disturb(model)
    qdora.save_adapter(model, tmp_path / "adapter")
    report = qdora.merge(tiny, tmp_path / "adapter", tmp_path / "out")
    assert report.base == "16-bit"
    assert report.comparison is not None
    assert report.comparison.kl_per_token < 1e-4
    trained = qdora.load_model(tiny, adapter=tmp_path / "adapter", load_in_4bit=False, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    a, b = trained(IDS).logits, plain(IDS).logits
    assert (a - b).norm() / a.norm() < 2e-3


def test_overflow_is_named_and_leaves_nothing(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, use_dora=False, target_modules=("up_proj",)))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B.fill_(1e6)
    qdora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite in float16.*bfloat16"):
        qdora.merge(tiny_nf4, tmp_path / "adapter", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    qdora.merge(tiny_nf4, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16", verify=False)


def test_refusals(tiny: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = make_model(tmp_path / "other", hidden_size=128)
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    for base, adapter, message in [
        (other, tiny_adapter, "for another model: .*is 128×192 here and 64×192"),
        (shallow, tiny_adapter, "not a linear of this base"),
        (tiny_nf4, tiny, "is not an adapter"),
        (tiny_adapter, tiny_adapter, "is an adapter, not a model"),
        (tmp_path / "absent", tiny_adapter, "no model at"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            qdora.merge(base, adapter, out)
    assert not out.exists()


def test_the_comparison_sees_a_difference(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, alpha=8))
    disturb(model, seed=1)
    qdora.save_adapter(model, tmp_path / "other")
    qdora.merge(tiny_nf4, tmp_path / "other", tmp_path / "out", verify=False)
    comparison = compare(tiny_nf4, tiny_adapter, tmp_path / "out")
    assert comparison.kl_per_token > 1e-2
    assert comparison.same_tokens < comparison.greedy_tokens
    assert comparison.gaps_at_divergence
    with pytest.raises(NumericsError, match="is not the one that was trained"):
        comparison.check("out")
    assert all(gap > 0 for gap in comparison.gaps_at_divergence)
    assert "answers part" in str(comparison)


def test_a_merge_that_is_another_function_is_not_left_behind(
    tiny: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_rows(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: object, scaling: float) -> torch.Tensor:
        return W + 2 * scaling * (B.float() @ A.float())

    monkeypatch.setattr(sys.modules["qdora.verbs.merge"], "merge_rows", wrong_rows)
    with pytest.raises(NumericsError, match="is not the one that was trained"):
        qdora.merge(tiny_nf4, tiny_adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_quantized_in_another_way_must_be_named(tiny: Path, tmp_path: Path) -> None:
    qdora.quantize(tiny, tmp_path / "nf4", double_quant=False)
    model = qdora.load_model(tmp_path / "nf4", adapter=AdapterConfig(rank=4))
    disturb(model)
    qdora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"name the NF4 checkpoint it was trained on .*nf4"):
        qdora.merge(tiny, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = qdora.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out")
    assert report.comparison is not None


def test_without_a_tokenizer_it_is_merged_and_said(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_nf4, tmp_path / "nf4", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    report = qdora.merge(tmp_path / "nf4", tiny_adapter, tmp_path / "out")
    assert report.comparison is None
    assert "not verified: " in str(report)
    assert "no usable tokenizer" in report.not_compared
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        qdora.merge(tmp_path / "nf4", tiny_adapter, tmp_path / "again", verify=True)


def test_dtype_and_places(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of bfloat16, float16, found 'float32'"):
        qdora.merge(tiny_nf4, tiny_adapter, tmp_path / "out", dtype="float32")
    for out in (tiny_nf4, tiny_adapter):
        with pytest.raises(ConfigError, match="is or holds the input"):
            qdora.merge(tiny_nf4, tiny_adapter, out, overwrite=True)


def test_what_is_not_adapted_stays_as_it_was(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, target_modules=("up_proj",)))
    disturb(model)
    qdora.save_adapter(model, tmp_path / "adapter")
    report = qdora.merge(tiny_nf4, tmp_path / "adapter", tmp_path / "out", verify=False)
    assert (report.merged_linears, report.dtype, report.out) == (2, "float16", tmp_path / "out")
    assert report.not_compared == "not asked for"
    merged, base = ShardReader(tmp_path / "out"), ShardReader(tiny_nf4)
    assert report.bytes_written == sum(merged.nbytes(key) for key in merged)
    for path in linear_paths(model):
        if not path.endswith("up_proj"):
            expected = model.get_submodule(path).base.dequantize().half()
            assert torch.equal(merged.get(f"{path}.weight"), expected)
    assert torch.equal(merged.get("model.norm.weight"), base.get("model.norm.weight").half())
    record = json.loads((tmp_path / "out" / "qdora_merge.json").read_text())
    assert record["base_model"] == str(tiny_nf4)
    assert record["adapter"] == str(tmp_path / "adapter")
    assert record["verified"] is None


def test_the_config_says_one_dtype_and_no_quantization(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "nf4"
    shutil.copytree(tiny_nf4, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", "author": "José"}))
    qdora.merge(base, tiny_adapter, tmp_path / "out", verify=False)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours.keys() == {*config, "author"} - {"quantization_config"}
    assert (ours["dtype"], ours["author"]) == ("float16", "José")


def test_an_output_that_holds_something_is_kept_unless_told(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qdora.merge(tiny_nf4, tiny_adapter, out, verify=False)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="is not empty"):
        qdora.merge(tiny_nf4, tiny_adapter, out, verify=False)
    assert (out / "mine.txt").read_text() == "kept"
    qdora.merge(tiny_nf4, tiny_adapter, out, verify=False, overwrite=True)
    assert not (out / "mine.txt").exists()


def test_a_model_too_large_to_compare_is_merged_and_said(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["qdora.verbs.merge"]
    monkeypatch.setattr(module, "fits_in_memory", lambda reader, linears: False)
    report = qdora.merge(tiny_nf4, tiny_adapter, tmp_path / "out")
    assert report.comparison is None
    assert report.not_compared == "the model does not fit in memory in fp32; --verify insists"
    insisted = qdora.merge(tiny_nf4, tiny_adapter, tmp_path / "insisted", verify=True)
    assert insisted.comparison is not None
    assert insisted.not_compared == ""


@pytest.mark.parametrize("trust", [True, False])
def test_trust_reaches_whatever_loads(
    trust: bool, tiny: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, told = sys.modules["qdora.verbs.merge"], []

    def listen(name: str) -> None:
        original = getattr(module, name)

        def heard(*args: object, **named: object) -> object:
            told.append((name, named.get("trust_remote_code", args[-1])))
            return original(*args, **named)

        monkeypatch.setattr(module, name, heard)

    names = ("is_nf4_checkpoint", "StoredBase", "load_tokenizer", "compare")
    for name in names:
        listen(name)
    qdora.merge(tiny, tiny_adapter, tmp_path / "out", **({"trust_remote_code": True} if trust else {}))
    assert told == [(name, trust) for name in names]


def test_the_messages_name_the_places(tiny: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    qdora.quantize(tiny, tmp_path / "custom", double_quant=False)
    model = qdora.load_model(tmp_path / "custom", adapter=AdapterConfig(rank=4))
    qdora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=f"and {tiny} is 16-bit; .*, or pass --onto_original$"):
        qdora.merge(tiny, tmp_path / "adapter", tmp_path / "out")
    disturb(model)
    qdora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(NumericsError, match=f"; {tmp_path / 'out'} was not written"):
        merge_wrongly(tmp_path / "custom", tmp_path / "adapter", tmp_path / "out")


def merge_wrongly(base: Path, adapter: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["qdora.verbs.merge"], "merge_rows", lambda W, A, B, m, scaling: W)
        qdora.merge(base, adapter, out)


def test_the_template_that_was_learned_goes_along(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    adapter, tokenizer = tmp_path / "adapter", make_tokenizer()
    shutil.copytree(tiny_adapter, adapter)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    tokenizer.save_pretrained(adapter)
    base = tmp_path / "base"
    shutil.copytree(tiny_nf4, base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    qdora.merge(base, adapter, tmp_path / "out", verify=False)
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.chat_template == tokenizer.chat_template
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer.json").write_text("{")  # of no use without a template, and no obstacle either
    qdora.merge(base, adapter, tmp_path / "out", verify=False, overwrite=True)
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {"default", "tools"}
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    templates = [{"name": "other", "template": "o"}, {"name": "default", "template": "d"}]
    (adapter / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
    assert template_beside(adapter) == "d"
    assert merged.get_vocab() == AutoTokenizer.from_pretrained(tiny_nf4).get_vocab()


def test_no_program_prefers_the_template_that_came_with_the_base(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base, adapter = shutil.copytree(tiny_nf4, tmp_path / "base"), shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "the base's", "more": "é"}))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "learned"
    tokenizer.save_pretrained(adapter)
    qdora.merge(base, adapter, tmp_path / "out", verify=False)
    assert gguf.SpecialVocab(tmp_path / "out").chat_template == "learned"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "learned"
    # The tokens are the same: no file but the template is the adapter's.
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {**settings, "more": "é"}


@pytest.mark.parametrize("change", ["tokens", "end", "beginning", "nothing"])
def test_a_tokenizer_with_other_tokens_goes_along(
    change: str, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base, adapter = shutil.copytree(tiny_nf4, tmp_path / "base"), shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (base / "vocab.txt").write_text("of the base")
    tokenizer = make_tokenizer()
    usual = tokenizer.eos_token_id
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": usual}))
    if change == "tokens":
        tokenizer.add_tokens(["<think>"], special_tokens=True)
    elif change == "end":
        tokenizer.eos_token = "<|end|>"
    elif change == "beginning":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A", pair="$A $B", special_tokens=[("<|end|>", tokenizer.convert_tokens_to_ids("<|end|>"))]
        )
    tokenizer.save_pretrained(adapter)
    qdora.merge(base, adapter, tmp_path / "out", verify=False)
    merged, (used, whose) = AutoTokenizer.from_pretrained(tmp_path / "out"), tokenizer_of(base, adapter, False)
    assert whose == "the adapter"
    assert merged("1<think>2").input_ids == used("1<think>2").input_ids
    assert merged.eos_token == used.eos_token
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == (usual if used.eos_token_id == usual else [used.eos_token_id, usual])
    assert (tmp_path / "out" / "vocab.txt").exists() == (change == "nothing")
    # Without a template it is not what chat uses, and stays behind.
    (adapter / "chat_template.jinja").unlink()
    qdora.merge(base, adapter, tmp_path / "out", verify=False, overwrite=True)
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged("1<think>2").input_ids == AutoTokenizer.from_pretrained(base)("1<think>2").input_ids


@pytest.mark.parametrize("left", ["both", "config.json"])
def test_generation_ends_where_the_learned_answers_do(
    left: str, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the base knows the end of a document alone, and says so in its model's config or in a file."""
    base, adapter = shutil.copytree(tiny_nf4, tmp_path / "base"), shutil.copytree(tiny_adapter, tmp_path / "adapter")
    tokenizer = make_tokenizer()
    document, answer = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|im_end|>"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": document}))
    if left == "both":
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [document], "top_p": 0.5}))
    else:
        (base / "generation_config.json").unlink()
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(adapter)
    ends: list[list[int]] = []
    answers = sys.modules["qdora.verify"]._answers
    monkeypatch.setattr("qdora.verify._answers", lambda *given: ends.append(given[-1]) or answers(*given))
    qdora.merge(base, adapter, tmp_path / "out", verify=True)
    assert ends == [sorted([document, answer])] * 2
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == [answer, document]
    assert found.pad_token_id == (None if left == "both" else tokenizer.pad_token_id)
    assert found.top_p == (0.5 if left == "both" else None)


def test_a_model_that_sees_too_has_its_ends_in_its_text_part() -> None:
    config = {"text_config": {"eos_token_id": 3, "pad_token_id": 0}, "eos_token_id": None, "bos_token_id": 1}
    assert _special_ids(config) == {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}


def test_a_tokenizer_for_a_base_that_has_none(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_nf4, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    make_tokenizer().save_pretrained(adapter)
    assert qdora.merge(base, adapter, tmp_path / "out").comparison is not None
    (adapter / "tokenizer.json").write_text("{")  # only a template: taken along as before
    qdora.merge(tiny_nf4, adapter, tmp_path / "out", overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == make_tokenizer().get_vocab()
    report = qdora.merge(base, adapter, tmp_path / "out", overwrite=True)
    assert "no usable tokenizer" in report.not_compared
