"""Modules trained whole: PEFT's files and ours are the same, tied or not, and merging writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qdora
from qdora import AdapterConfig, CheckpointError, ConfigError
from qdora.adapterfile import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from qdora.loss import answer_loss
from qdora.whole import trained_whole
from tests.conftest import make_model
from tests.test_checkpoint import dense_twin, distance, logits

IDS = torch.arange(3, 43)[None]
EMBEDDING, HEAD, BOTH = ("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied") / "model", tie=False)


@pytest.fixture(scope="module")
def untied_nf4(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("untied") / "nf4"
    qdora.quantize(untied, out)
    return out


@pytest.fixture
def bases(tiny: Path, tiny_nf4: Path, untied: Path, untied_nf4: Path) -> dict[str, tuple[Path, Path]]:
    """(16-bit, NF4) of a model whose head is its embedding, and of one whose head is not."""
    return {"tied": (tiny, tiny_nf4), "untied": (untied, untied_nf4)}


def trained(model: Any, steps: int = 3) -> Any:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "names", "use_dora"),
    [
        ("tied", EMBEDDING, True),
        ("tied", HEAD, False),
        ("tied", ("norm",), True),
        ("untied", EMBEDDING, True),
        ("untied", HEAD, True),
        ("untied", BOTH, False),
    ],
    ids=str,
)
def test_ours_in_peft_and_merged(
    kind: str, names: tuple[str, ...], use_dora: bool, bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    original, nf4 = bases[kind]
    config = AdapterConfig(rank=4, alpha=8, use_dora=use_dora, modules_to_save=names, dtype="float32")
    model = trained(qdora.load_model(nf4, config, dtype="float32"))
    expected, base = logits(model), logits(qdora.load_model(nf4, dtype="float32"))
    assert distance(expected, base) > 1e-2
    with qdora.adapters_disabled(model):
        assert torch.equal(logits(model), base)
    qdora.save_adapter(model, tmp_path / "adapter")
    assert distance(logits(qdora.load_model(nf4, tmp_path / "adapter", dtype="float32")), expected) < 1e-5
    theirs = PeftModel.from_pretrained(dense_twin(nf4, original), tmp_path / "adapter")
    assert distance(logits(theirs), expected) < 1e-4
    report = qdora.merge(nf4, tmp_path / "adapter", tmp_path / "merged")
    assert report.comparison is not None
    assert report.comparison.kl_per_token < 1e-4
    written = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert report.bytes_written == sum(tensor.nbytes for tensor in written)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert distance(logits(merged), expected) < 2e-3
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (kind == "tied")


@pytest.mark.parametrize(
    ("kind", "names", "tie"),
    [
        ("tied", EMBEDDING, True),
        ("tied", EMBEDDING, False),
        ("tied", HEAD, False),
        ("tied", BOTH, True),
        ("tied", BOTH, False),
        ("untied", BOTH, False),
        ("untied", ("norm",), False),  # to PEFT every layer's norms too
    ],
    ids=str,
)
def test_peft_s_in_ours_and_merged(
    kind: str, names: tuple[str, ...], tie: bool, bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    original, nf4 = bases[kind]
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules="all-linear",
        modules_to_save=list(names),
        ensure_weight_tying=tie,
        task_type="CAUSAL_LM",
    )
    theirs = trained(get_peft_model(dense_twin(nf4, original), config))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = qdora.load_model(nf4, tmp_path / "adapter", dtype="float32")
    assert distance(logits(ours), logits(theirs)) < 1e-4
    qdora.save_adapter(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(dense_twin(nf4, original), tmp_path / "again")
    assert distance(logits(again), logits(theirs)) < 1e-4
    qdora.merge(nf4, tmp_path / "adapter", tmp_path / "merged", verify=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert distance(logits(merged), logits(theirs)) < 2e-3
    written = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {tensor.dtype for tensor in written} == {torch.float16}
    stays_one = kind == "tied" and tie
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is stays_one


def test_lora_on_embedding_or_head_is_refused(untied: Path, tmp_path: Path) -> None:
    for target, saves_embeddings in (("lm_head", False), ("lm_head", True), ("embed_tokens", False)):
        model = AutoModelForCausalLM.from_pretrained(untied)
        theirs = get_peft_model(model, LoraConfig(target_modules=["q_proj", target], task_type="CAUSAL_LM"))
        theirs.save_pretrained(tmp_path / target, save_embedding_layers=saves_embeddings)
        with pytest.raises(CheckpointError, match=rf"{target}.*only be trained whole here .*; merge it by PEFT$"):
            qdora.load_model(untied, tmp_path / target, load_in_4bit=False)


def test_a_pair_that_is_one_weight_stays_one(tiny_nf4: Path, tmp_path: Path) -> None:
    model = trained(qdora.load_model(tiny_nf4, AdapterConfig(rank=2, modules_to_save=("lm_head",))))
    assert sorted(trained_whole(model)) == ["lm_head", "model.embed_tokens"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["ensure_weight_tying"] is True
    keys = [key for key in load_file(tmp_path / WEIGHTS_FILE) if "lora" not in key]
    assert keys == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]


def test_the_chunked_loss_has_the_head_s_gradient() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(2, 9, 16), torch.randn(50, 16), torch.randint(50, (2, 9))
    weight.requires_grad_()
    answer_loss(hidden, weight, labels, chunk_bytes=700).backward()
    ours, weight.grad = weight.grad, None
    logits = (hidden[:, :-1] @ weight.t()).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").backward()
    assert ours is not None
    assert weight.grad is not None
    assert distance(ours, weight.grad) < 1e-5


def test_the_flag_trains_resumes_and_reports(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    def run(out: str, **more: Any) -> None:
        qdora.train(
            model_name_or_path=str(tiny_nf4),
            dataset=str(pairs_file),
            output_dir=str(tmp_path / out),
            modules_to_save=["embed_tokens"],
            save_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
            **more,
        )

    run("whole", max_steps=2)
    run("cut", max_steps=2, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    files = [load_file(tmp_path / out / WEIGHTS_FILE) for out in ("whole", "cut")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    before = load_file(tiny_nf4 / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(files[0]["base_model.model.model.embed_tokens.weight"], before)
    assert "| modules to save |" in (tmp_path / "whole" / "report.md").read_text()


def test_refusals(tiny_nf4: Path, untied_nf4: Path, tmp_path: Path) -> None:
    for names, settings, message in [
        (("embed_token",), {}, "names 'embed_token', which is no module here; did you mean embed_tokens?"),
        (("q_proj",), {}, "names 'model.layers.0.self_attn.q_proj', a DoRALinear; only embedding, head and norms"),
        (("mlp",), {}, "a GatedMLP; only embedding"),
        (("embed_tokens",), {"embedding_on_host": True}, "a HostEmbedding; only embedding, head and norms on the"),
    ]:
        with pytest.raises(ConfigError, match=message):
            qdora.load_model(untied_nf4, AdapterConfig(modules_to_save=names), **settings)
    with pytest.raises(ConfigError, match="is a list of names, found 'lm_head'"):
        AdapterConfig(modules_to_save="lm_head")  # type: ignore[arg-type]
    model = qdora.load_model(untied_nf4, AdapterConfig(modules_to_save=("lm_head",)))
    qdora.save_adapter(model, tmp_path)
    other = qdora.load_model(untied_nf4, AdapterConfig())
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(tmp_path))} trained other modules whole .* first 'lm_head.w"
    ):
        qdora.load_adapter(other, tmp_path)


def test_damaged_files_are_named(untied_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(untied_nf4, AdapterConfig(modules_to_save=("lm_head",)))
    adapter = tmp_path / "damaged"
    qdora.save_adapter(model, adapter)
    tensors = load_file(adapter / WEIGHTS_FILE)
    key = next(key for key in tensors if "lm_head" in key)
    save_file({**tensors, key: tensors[key] / 0}, adapter / WEIGHTS_FILE)
    with pytest.raises(
        CheckpointError, match=r"damaged holds values that are not finite in '.*\.lm_head\.weight'; its"
    ):
        read_adapter(adapter)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, adapter / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="damaged names 'lm_head' in modules_to_save, and holds no weight of it"):
        read_adapter(adapter)


def test_a_head_of_another_size_is_refused(untied_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(untied_nf4, AdapterConfig(modules_to_save=("lm_head",)))
    qdora.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = next(key for key in tensors if "lm_head" in key)
    save_file({**tensors, key: tensors[key][:7, :5].contiguous()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \(400, 64\) here and \(7, 5\) in the adapter"):
        qdora.load_adapter(model, tmp_path)


def test_a_config_that_says_nothing_of_tying_ties_nothing(untied_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(untied_nf4, AdapterConfig(modules_to_save=("lm_head",)))
    qdora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config.pop("ensure_weight_tying", None)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert not read_adapter(tmp_path).config.ensure_weight_tying


def test_beside_a_streamed_base(untied_nf4: Path) -> None:
    config = AdapterConfig(rank=2, modules_to_save=("embed_tokens", "lm_head"))
    plain, streamed = (qdora.load_model(untied_nf4, config, stream_base=stream) for stream in (False, True))
    streamed.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(logits(streamed), logits(plain))


def test_the_estimate_counts_them(untied_nf4: Path) -> None:
    def estimate(*names: str) -> dict[str, int]:
        whole = list(names) or None
        return qdora.estimate(str(untied_nf4), max_length=64, modules_to_save=whole, use_cpu=True).need.parts

    alone, beside = estimate(), estimate("embed_tokens", "lm_head")
    model = qdora.load_model(untied_nf4)
    copies = sum(model.get_submodule(path).weight.nbytes for path in ("model.embed_tokens", "lm_head"))
    assert beside["adapters"] - alone["adapters"] == copies
    assert beside["embeddings and head"] == alone["embeddings and head"]
