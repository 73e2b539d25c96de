"""Adapters on disk, and PEFT reading ours and we reading PEFT's, on the same weights.

Budgets as ‖ours − theirs‖ / ‖theirs‖ of the logits. fp32, PEFT on the dequantized weights: 1e-4. bf16, PEFT on
bitsandbytes' own 4-bit linears: 5e-2, twice the distance that PEFT itself, in bf16, keeps from the fp32 truth here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import qdora
from qdora import AdapterConfig, CheckpointError, ConfigError
from qdora.adapterfile import (
    _HARMLESS,
    _UNSUPPORTED,
    CONFIG_FILE,
    OFFSETS_FILE,
    WEIGHTS_FILE,
    peft_config,
    read_adapter,
)
from qdora.checkpoint import _TAKEN_FOR_EXPERTS, _TAKEN_IN, _target_names
from qdora.distributed import say_once
from qdora.inject import adapted_linears, linear_paths
from qdora.shards import ShardReader, fingerprint
from tests.conftest import disturb, make_model
from tests.families import make_family

IDS = torch.arange(3, 43)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def dense_twin(nf4: Path, original: Path) -> Any:
    """A plain fp32 model with exactly the values of the NF4 checkpoint."""
    plain = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    ours = qdora.load_model(nf4, dtype="float32")
    with torch.no_grad():
        for path in linear_paths(ours):
            plain.get_submodule(path).weight.copy_(ours.get_submodule(path).base.dequantize())
    return plain


CONFIGS = {
    "dora": {},
    "lora": {"use_dora": False},
    "some": {"target_modules": ("q_proj", "mlp.up_proj")},
    "expression": {"target_modules": r"model\.layers\.1\..*_proj"},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"k_proj": 3.0}},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_computes_what_we_compute(name: str, tiny: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=8, **CONFIGS[name])  # type: ignore[arg-type]
    model = qdora.load_model(tiny_nf4, adapter=config)
    disturb(model)
    qdora.save_adapter(model, tmp_path)

    in_fp32 = logits(qdora.load_model(tiny_nf4, adapter=tmp_path, dtype="float32"))
    theirs = logits(PeftModel.from_pretrained(dense_twin(tiny_nf4, tiny), tmp_path))
    assert distance(in_fp32, theirs) < 1e-4
    assert distance(logits(qdora.load_model(tiny_nf4, dtype="float32")), theirs) > 1e-2

    packed = AutoModelForCausalLM.from_pretrained(tiny_nf4, dtype=torch.bfloat16).train()
    assert distance(logits(model), logits(PeftModel.from_pretrained(packed, tmp_path).train())) < 5e-2


@pytest.mark.parametrize("use_dora", [True, False])
def test_we_compute_what_peft_trained(use_dora: bool, tiny: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, use_dora=use_dora, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(dense_twin(tiny_nf4, tiny), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(5):
        theirs(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    ours = qdora.load_model(tiny_nf4, adapter=tmp_path, dtype="float32")
    assert next(iter(adapted_linears(ours).values())).lora_A.dtype == torch.float32
    assert distance(logits(ours), logits(theirs)) < 1e-4
    assert distance(logits(qdora.load_model(tiny_nf4, dtype="float32")), logits(theirs)) > 1e-2


def test_round_trip_keeps_every_bit_with_offsets(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    disturb(model)
    with torch.no_grad():
        for layer in adapted_linears(model).values():
            layer.magnitude_offset.mul_(1e-5)
    qdora.save_adapter(model, tmp_path / "exact", exact_offsets=True)
    qdora.save_adapter(model, tmp_path / "plain")
    assert (tmp_path / "exact" / OFFSETS_FILE).is_file()
    assert not (tmp_path / "plain" / OFFSETS_FILE).exists()
    with safe_open(tmp_path / "exact" / OFFSETS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    exact = qdora.load_model(tiny_nf4, adapter=tmp_path / "exact")
    plain = qdora.load_model(tiny_nf4, adapter=tmp_path / "plain")
    for path, layer in adapted_linears(model).items():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(exact.get_submodule(path).get_parameter(name), parameter)
        magnitude = plain.get_submodule(path).magnitude()
        assert torch.allclose(magnitude, layer.magnitude(), rtol=1e-6, atol=0)


def test_offsets_that_contradict_the_adapter_are_not_believed(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    disturb(model)
    qdora.save_adapter(model, tmp_path, exact_offsets=True)
    stale = (tmp_path / OFFSETS_FILE).read_bytes()
    disturb(model, seed=1)
    qdora.save_adapter(model, tmp_path)
    assert not (tmp_path / OFFSETS_FILE).exists()
    for content in (stale, save({path: torch.zeros(3) for path in adapted_linears(model)})):
        (tmp_path / OFFSETS_FILE).write_bytes(content)
        assert distance(logits(qdora.load_model(tiny_nf4, adapter=tmp_path)), logits(model)) < 1e-2


def test_loading_into_a_model_that_has_run(tiny_nf4: Path, tiny_adapter: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, alpha=8))
    fresh = logits(model)
    qdora.load_adapter(model, tiny_adapter)
    loaded = logits(model)
    assert not torch.equal(loaded, fresh)
    assert torch.equal(loaded, logits(qdora.load_model(tiny_nf4, adapter=tiny_adapter)))


def test_the_file_is_peft_s(tiny_adapter: Path) -> None:
    config = json.loads((tiny_adapter / CONFIG_FILE).read_text())
    assert config["use_dora"] is True
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    tensors = load_file(tiny_adapter / WEIGHTS_FILE)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert tensors[f"{key}A.weight"].dtype == torch.bfloat16
    assert tensors[f"{key}magnitude_vector.weight"].dtype == torch.float32
    assert read_adapter(tiny_adapter).base_kind == "nf4"


def damaged(adapter: Path, out: Path, config: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A copy with other config entries; tensors by the end of their key, None to take one out."""
    shutil.copytree(adapter, out)
    path = out / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    content = load_file(out / WEIGHTS_FILE)
    for suffix, change in tensors.items():
        key = next((k for k in content if k.endswith(suffix)), suffix)
        value = change(content.pop(key)) if key in content else change
        if value is not None:
            content[key] = value
    save_file(content, out / WEIGHTS_FILE)
    return out


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "'IA3' adapter"),
        ({"bias": "all"}, {}, "uses bias"),
        ({"modules_to_save": ["lm_head"]}, {}, "names 'lm_head' in modules_to_save, and holds no weight"),
        ({"r": 0}, {}, "not a LoRA config"),
        ({"r": 8}, {}, "do not agree with rank 8"),
        ({"use_dora": False}, {}, "with use_dora=False"),
        ({}, {"lora_A.weight": lambda t: t * float("nan")}, "not finite"),
        ({}, {"lora_A.weight": lambda t: None}, "has the parts B, magnitude"),
        ({}, {"lora_B.weight": lambda t: t[:-1].clone()}, "do not agree with rank"),
        ({}, {"other.bias": torch.ones(1)}, "no part of a LoRA or DoRA linear$"),
        ({}, {"embed_tokens.weight": torch.ones(1)}, "an embedding that was given more tokens so; merge it by PEFT$"),
    ],
)
def test_damaged_adapters(
    config: dict[str, Any], tensors: dict[str, Any], message: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_adapter(damaged(tiny_adapter, tmp_path / "bad", config, **tensors))


def test_what_is_no_adapter(tiny: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found a model directory"):
        read_adapter(tiny)
    with pytest.raises(
        CheckpointError, match=r"absent is not an adapter: expected adapter_config.json, found no such file$"
    ):
        read_adapter(tmp_path / "absent")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_adapter, broken)
    (broken / WEIGHTS_FILE).write_bytes((broken / WEIGHTS_FILE).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"missing or damaged: .*invalid header|missing or damaged: .*incomplete"):
        read_adapter(broken)
    (broken / CONFIG_FILE).write_text("[")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_adapter(broken)


def test_an_adapter_for_another_model(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", hidden_size=128)
    with pytest.raises(
        CheckpointError, match=r"another model: .*down_proj is 128×192 here and 64×192 in .* made for '"
    ):
        qdora.load_model(other, adapter=tiny_adapter)
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    name, made_for = "model.layers.1.mlp.down_proj", read_adapter(tiny_adapter).base_model
    end = f"it adapts {name!r}, which is not a linear here; it was made for {made_for!r}"
    with pytest.raises(CheckpointError, match=f"{re.escape(end)}$"):
        qdora.load_model(shallow, adapter=tiny_adapter)
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=8))
    with pytest.raises(CheckpointError, match="rank 8 here and 4"):
        qdora.load_adapter(model, tiny_adapter)
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, alpha=16))
    with pytest.raises(
        CheckpointError, match=r"by 4 here and by 2 in the adapter; keep the rank, alpha and rsLoRA that .*h$"
    ):
        qdora.load_adapter(model, tiny_adapter)
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, alpha=8, target_modules=("q_proj",)))
    with pytest.raises(
        CheckpointError,
        match=f"{re.escape(str(tiny_adapter))} adapts other linears than the model does, first 'model.layers.0.mlp.d",
    ):
        qdora.load_adapter(model, tiny_adapter)


def test_whom_an_adapter_was_made_for_is_said_if_it_is_known(tiny_adapter: Path) -> None:
    linear = next(iter(read_adapter(tiny_adapter).linears.values()))
    for base, end in (("org/model", ", which was made for 'org/model'$"), (None, r"\d in the adapter$")):
        with pytest.raises(CheckpointError, match=end):
            linear.check_shape("here", 3, 5, base)


def test_damaged_offsets_are_named(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    qdora.save_adapter(model, tmp_path, exact_offsets=True)
    (tmp_path / OFFSETS_FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=rf"{OFFSETS_FILE} is damaged: .*header"):
        qdora.load_model(tiny_nf4, adapter=tmp_path)
    (tmp_path / OFFSETS_FILE).unlink()
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {WEIGHTS_FILE}; download or write it again$"):
        read_adapter(tmp_path)


def test_an_adapter_of_some_of_the_linears_that_its_config_names(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(tiny_adapter, tmp_path / "some")
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.0" in key}, adapter / WEIGHTS_FILE)
    model = qdora.load_model(tiny_nf4, adapter)
    assert set(adapted_linears(model)) == {path for path in linear_paths(model) if "layers.0" in path}
    assert model.qdora_adapter.target_modules == tuple(sorted(adapted_linears(model)))


def test_the_shortest_names_that_mean_just_these() -> None:
    experts = [f"layers.{layer}.mlp.experts.{number}.up_proj" for layer in (0, 1) for number in (0, 1)]
    linears = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.up_proj", *experts]
    by_expression = AdapterConfig(target_modules=r".*experts.*")
    assert _target_names(by_expression, experts, linears) == ("experts.up_proj",)
    assert _target_names(by_expression, experts, linears, keep_all=True) == r".*experts.*"
    by_name = AdapterConfig(target_modules=("q_proj", "nothing"))
    assert _target_names(by_name, linears[:2], linears) == ("q_proj", "nothing")
    assert _target_names(AdapterConfig(), linears[:2], linears[:2]) == ("q_proj",)
    assert _target_names(by_name, linears[:1], linears) == ("layers.0.q_proj",)
    by_more = AdapterConfig(target_modules=("q_proj", "up_proj"))
    assert _target_names(by_more, linears[:2], linears) == ("q_proj",)


@pytest.mark.parametrize("expression", [".*mlp.*", r".*layers\.0\..*", ".*(q_proj|lm_head)", ".*[qk]_proj"])
def test_peft_takes_an_expression_for_what_it_meant_here(expression: str, tiny: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny, adapter=AdapterConfig(rank=2, target_modules=expression), load_in_4bit=False)
    disturb(model)
    qdora.save_adapter(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(plain, tmp_path)
    adapted = {name.split(".lora_A")[0] for name, _ in theirs.named_modules() if name.endswith("lora_A")}
    assert adapted == {f"base_model.model.{path}" for path in adapted_linears(model)}


def test_nothing_to_save(tiny_nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the model has no adapters to save; attach some with load_model"):
        qdora.save_adapter(qdora.load_model(tiny_nf4), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq"},
        {"modules_to_save": ["lm_head"]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"bias": "all"},
        {"layer_replication": [[0, 2]]},
    ],
    ids=str,
)
def test_what_changes_the_forward_in_other_ways_is_refused(
    change: dict[str, Any], tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        qdora.load_model(tiny_nf4, adapter=tmp_path / "a")


def test_the_kind_of_base_is_recorded(tiny: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    qdora.quantize(tiny, tmp_path / "single", double_quant=False)
    qdora.quantize(tiny, tmp_path / "fp16", dtype="float16")
    for base, settings, kind in [
        (tiny_nf4, {}, "nf4"),
        (tiny_nf4, {"stream_base": True}, "nf4"),
        (tiny, {"load_in_4bit": True}, "nf4"),
        (tiny, {"load_in_4bit": False}, "dense"),
        (tmp_path / "single", {}, "nf4-custom"),
        (tmp_path / "fp16", {}, "nf4-custom"),
        (tmp_path / "fp16", {"dtype": "bfloat16"}, "nf4-custom"),
        (tiny_nf4, {"dtype": "float16"}, "nf4"),
    ]:
        model = qdora.load_model(base, adapter=AdapterConfig(rank=2), **settings)
        qdora.save_adapter(model, tmp_path / "a")
        assert read_adapter(tmp_path / "a").base_kind == kind


def test_the_fingerprint_of_the_base_is_recorded(tiny: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    for base, settings in [
        (tiny_nf4, {}),
        (tiny, {}),
        (tiny, {"load_in_4bit": False}),
        (tiny_nf4, {"stream_base": True, "embedding_on_host": False}),
    ]:
        model = qdora.load_model(base, adapter=AdapterConfig(rank=2), **settings)
        qdora.save_adapter(model, tmp_path / "a")
        assert read_adapter(tmp_path / "a").base_hash == model.qdora_base_hash == fingerprint(ShardReader(base))
    assert fingerprint(ShardReader(tiny)) != fingerprint(ShardReader(tiny_nf4))
    again = qdora.load_model(tiny_nf4, adapter=tmp_path / "a")
    qdora.save_adapter(again, tmp_path / "b")
    assert read_adapter(tmp_path / "b").base_hash == fingerprint(ShardReader(tiny_nf4))


def test_an_adapter_without_a_fingerprint(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=2))
    del model.qdora_base_hash
    qdora.save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).base_hash is None
    assert read_adapter(tmp_path).base_kind == "nf4"


def test_pickled_adapters_and_whole_numbers(tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS_FILE)
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key].to(torch.int64)}, adapter / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"holds torch\.int64 in .*an adapter is in float32 or 16 bits"):
        read_adapter(adapter)
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"a pickle, which runs code when opened; convert it to safetensors first$"
    ):
        read_adapter(adapter)


def test_what_is_written_to_the_last_key(tiny_nf4: Path, tmp_path: Path) -> None:
    config = AdapterConfig(
        rank=4,
        alpha=6.0,
        dropout=0.125,
        use_rslora=True,
        target_modules=("q_proj", "mlp.up_proj"),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 3.0},
    )
    model = qdora.load_model(tiny_nf4, adapter=config)
    qdora.save_adapter(model, tmp_path / "new" / "a", exact_offsets=True)
    assert sorted(path.name for path in (tmp_path / "new" / "a").iterdir()) == sorted(
        [CONFIG_FILE, WEIGHTS_FILE, OFFSETS_FILE]
    )
    assert json.loads((tmp_path / "new" / "a" / CONFIG_FILE).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny_nf4),
        "r": 4,
        "lora_alpha": 6.0,
        "lora_dropout": 0.125,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["q_proj", "mlp.up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 3.0},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "ensure_weight_tying": False,
    }
    read = read_adapter(tmp_path / "new" / "a")
    assert read.config == replace(config, target_modules=("mlp.up_proj", "q_proj"))
    assert read.base_model == str(tiny_nf4)
    with safe_open(tmp_path / "new" / "a" / WEIGHTS_FILE, framework="pt") as file:
        facts = {"qdora_base", "qdora_base_hash", "qdora_base_source", "qdora_base_probe"}
        assert file.metadata().keys() == {"format", *facts}
        assert file.metadata()["format"] == "pt"
    up, q = (read.linears[f"model.layers.0.{name}"] for name in ("mlp.up_proj", "self_attn.q_proj"))
    assert (up.A.shape, up.B.shape, up.scaling) == ((4, 64), (192, 4), 3.0 / 2)
    assert (q.A.shape, q.B.shape, q.scaling) == ((2, 64), (64, 2), 6.0 / 2**0.5)
    assert up.magnitude.dtype == torch.float32


def test_another_process_writes(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=2, use_dora=False))
    qdora.save_adapter(model, tmp_path / "a", write=False)
    assert not (tmp_path / "a").exists()
    qdora.save_adapter(model, tmp_path / "a", exact_offsets=True)
    assert not (tmp_path / "a" / OFFSETS_FILE).exists()  # LoRA has none
    loaded = qdora.load_model(tiny_nf4, adapter=tmp_path / "a")
    assert loaded.qdora_adapter == replace(AdapterConfig(rank=2, use_dora=False), target_modules=ALL_NAMES)


ALL_NAMES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def test_what_a_config_need_not_say(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    shutil.copytree(tiny_adapter, path)
    sparse = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}
    for more in ({}, {"target_modules": None, "rank_pattern": None, "alpha_pattern": None, "bias": "none"}):
        (path / CONFIG_FILE).write_text(json.dumps({**sparse, **more}))
        read = read_adapter(path)
        assert read.config == AdapterConfig(rank=4, alpha=8)
        assert read.base_model is None
        (model := qdora.load_model(tiny_nf4)).eval()
        qdora.load_adapter(model, path)
        assert model.qdora_adapter == read.config
        shallow = qdora.load_model(make_model(tmp_path / f"shallow-{len(more)}", num_hidden_layers=1))
        with pytest.raises(CheckpointError, match=r"is not a linear here$"):
            qdora.load_adapter(shallow, path)
    for init in (True, False, None, "gaussian", "eva", "orthogonal"):
        (path / CONFIG_FILE).write_text(json.dumps({**sparse, "init_lora_weights": init}))
        assert read_adapter(path).config.rank == 4
    (path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    with pytest.raises(CheckpointError, match=r"sparse: .* has the parts A, B, magnitude; .*=False it needs A, B$"):
        read_adapter(path)
    for name in ("r", "lora_alpha"):
        (path / CONFIG_FILE).write_text(json.dumps({key: value for key, value in sparse.items() if key != name}))
        with pytest.raises(CheckpointError, match=f"{CONFIG_FILE} is not a LoRA config: '{name}'"):
            read_adapter(path)
    (path / CONFIG_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{CONFIG_FILE} is not a JSON object"):
        read_adapter(path)


@pytest.mark.parametrize(
    "name",
    [
        *("target_parameters", "trainable_token_indices", "lora_bias", "alora_invocation_tokens"),
        *("use_qalora", "use_bdlora", "velora_config", "kasa_config", "monteclora_config", "arrow_config"),
        "layer_replication",
    ],
)
def test_each_thing_the_layer_has_not_is_named(name: str, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"bad uses {name}, which qdora does not load$"):
        read_adapter(damaged(tiny_adapter, tmp_path / "bad", {name: True}))


def test_every_field_of_peft_s_config_is_known_and_what_is_not_is_said(
    tiny_adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="qdora")
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= {*_UNSUPPORTED, *_HARMLESS, *peft_config(AdapterConfig(), "all-linear", None)}
    LoraConfig(r=4, lora_alpha=8, use_dora=True, revision="main", layers_to_transform=[0, 1]).save_pretrained(tmp_path)
    by_peft = json.loads((tmp_path / CONFIG_FILE).read_text())
    read_adapter(damaged(tiny_adapter, tmp_path / "today", {**by_peft, "target_modules": None, "new": None, "x": []}))
    assert not caplog.records
    later = damaged(tiny_adapter, tmp_path / "later", {"use_fdora": True, "another": {"a": 1}})
    for _ in range(2):
        read_adapter(later)
    (record,) = caplog.records
    assert record.message == (
        f"qdora: {later} was written by a newer PEFT: 'another, use_fdora', which is not known here, is left out"
    )


@pytest.mark.parametrize(
    ("name", "value", "found", "wanted"),
    [
        ("use_dora", "false", "'false'", "true or false"),
        ("use_rslora", 1, "1", "true or false"),
        ("base_model_name_or_path", 5, "5", "a text"),
        ("base_model_name_or_path", {}, "{}", "a text"),
        ("base_model_name_or_path", [], r"\[\]", "a text"),
        ("modules_to_save", [1], r"\[1\]", "a list of names"),
        ("modules_to_save", {"lm_head": 1}, "{'lm_head': 1}", "a list of names"),
    ],
)
def test_a_value_of_another_kind(
    name: str, value: Any, found: str, wanted: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    bad = damaged(tiny_adapter, tmp_path / "bad", {name: value})
    with pytest.raises(CheckpointError, match=f"is not a LoRA config: {name} is {found}; it must be {wanted}$"):
        read_adapter(bad)
    if name != "modules_to_save":
        read_adapter(damaged(tiny_adapter, tmp_path / "null", {name: None} if name != "use_dora" else {}))


def test_a_text_in_modules_to_save_is_one_name(tiny_adapter: Path, tmp_path: Path) -> None:
    weight = {"base_model.model.lm_head.weight": torch.ones(2, 2)}
    adapter = damaged(tiny_adapter, tmp_path / "text", {"modules_to_save": "lm_head"}, **weight)
    read = read_adapter(adapter)
    assert read.config.modules_to_save == ("lm_head",)
    assert read.whole.keys() == {"lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_what_was_trained_whole_is_in_floats_too(dtype: torch.dtype, tiny_adapter: Path, tmp_path: Path) -> None:
    weight = {"base_model.model.model.norm.weight": torch.ones(64).to(dtype)}
    adapter = damaged(tiny_adapter, tmp_path / "odd", {"modules_to_save": ["norm"]}, **weight)
    message = rf"odd holds {re.escape(str(dtype))} in '.*\.model\.norm\.weight'; an adapter is in float32 or"
    with pytest.raises(CheckpointError, match=message):
        read_adapter(adapter)


def test_several_things_are_named_together(tiny_adapter: Path, tmp_path: Path) -> None:
    change = {"init_lora_weights": "pissa", "bias": "all", "lora_bias": True}
    with pytest.raises(CheckpointError, match=r"uses lora_bias, init_lora_weights='pissa', bias, which"):
        read_adapter(damaged(tiny_adapter, tmp_path / "bad", change))


def test_shapes_and_parts_are_quoted(tiny_adapter: Path, tmp_path: Path) -> None:
    for number, (tensors, message) in enumerate(
        [
            ({"lora_A.weight": lambda t: t[0].clone()}, r"rank 4: A \(\d+,\), B \(\d+, 4\), magnitude \(\d+,\)$"),
            ({"lora_B.weight": lambda t: t[:, 0].clone()}, r"rank 4: A \(4, \d+\), B \(\d+,\), magnitude \(\d+,\)$"),
            ({"lora_B.weight": lambda t: t[:, 1:].clone()}, r"do not agree with rank 4"),
            ({"lora_A.weight": lambda t: t[1:].clone()}, r"do not agree with rank 4"),
            ({"magnitude_vector.weight": lambda t: t[1:].clone()}, r"do not agree with rank 4"),
            ({"lora_A.weight": lambda t: None}, r"has the parts B, magnitude; with use_dora=True it needs A, B, mag"),
            ({"x.lora_C.weight": torch.ones(2)}, r"bad\d holds 'x\.lora_C\.weight', which is no part of"),
            (
                {"lora_A.weight": lambda t: t * float("inf")},
                r"not finite in 'base_model.*lora_A\.weight'; its training",
            ),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            read_adapter(damaged(tiny_adapter, tmp_path / f"bad{number}", **tensors))
    empty = tmp_path / "empty"
    shutil.copytree(tiny_adapter, empty)
    save_file({}, empty / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="empty holds no adapter tensors"):
        read_adapter(empty)


def test_either_key_of_the_magnitude_is_enough_and_both_must_agree(tiny_adapter: Path, tmp_path: Path) -> None:
    peft_s, both, odd = (shutil.copytree(tiny_adapter, tmp_path / name) for name in ("peft_s", "both", "odd"))
    tensors = load_file(tiny_adapter / WEIGHTS_FILE)
    bare = {name.removesuffix(".weight") if "magnitude" in name else name: t for name, t in tensors.items()}
    assert tensors.keys() != bare.keys()
    save_file(bare, peft_s / WEIGHTS_FILE)
    save_file({**tensors, **{name: t.clone() for name, t in bare.items()}}, both / WEIGHTS_FILE)
    ours = read_adapter(tiny_adapter)
    for adapter in (peft_s, both):
        theirs = read_adapter(adapter)
        for path, linear in ours.linears.items():
            assert torch.equal(linear.magnitude, theirs.linears[path].magnitude)
        assert (theirs.base_kind, theirs.base_hash) == (None, None)
    name = next(name for name in bare if "magnitude" in name)
    for other in (bare[name] * 2, bare[name][1:].bfloat16()):
        save_file({**tensors, name: other}, odd / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=r"odd holds two magnitudes that differ, one in 'base.*; keep the r"):
            read_adapter(odd)


@pytest.mark.parametrize("use_dora", [True, False])
def test_transformers_and_peft_load_the_same_directory(
    use_dora: bool, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = AdapterConfig(rank=4, alpha=8, use_dora=use_dora)
    ours = qdora.load_model(tiny, adapter=config, load_in_4bit=False, dtype="float32")
    disturb(ours)
    qdora.save_adapter(ours, tmp_path)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain, another = (AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2))
    plain.load_adapter(str(tmp_path))
    by_peft = PeftModel.from_pretrained(another, tmp_path)
    assert "lora_" not in caplog.text  # transformers reports what it does not take
    for theirs in (by_transformers, plain, by_peft):
        assert distance(logits(theirs), logits(ours)) < 1e-5
    by_peft.save_pretrained(tmp_path / "again")
    again = qdora.load_model(tiny, adapter=tmp_path / "again", load_in_4bit=False, dtype="float32")
    assert distance(logits(again), logits(ours)) < 1e-5


def test_one_matrix_in_fp32_makes_the_adapter_fp32(tiny_adapter: Path, tmp_path: Path) -> None:
    mixed = damaged(tiny_adapter, tmp_path / "mixed", **{"lora_A.weight": lambda t: t.float()})
    assert read_adapter(mixed).config.dtype == "float32"
    assert read_adapter(tiny_adapter).config.dtype == "bfloat16"


def test_a_model_with_another_method_is_refused(tiny_nf4: Path, tiny_adapter: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, alpha=8, use_dora=False))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\..*: one of model and adapter has a magnitude and"):
        qdora.load_adapter(model, tiny_adapter)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arithmetic_in_another_dtype_means_the_same_nf4_weights(dtype: str, tiny: Path, tmp_path: Path) -> None:
    usual, other = (
        qdora.load_model(tiny, adapter=AdapterConfig(rank=2), load_in_4bit=True, dtype=each)
        for each in ("bfloat16", dtype)
    )
    for one, another in zip(adapted_linears(usual).values(), adapted_linears(other).values(), strict=True):
        assert torch.equal(one.base.dequantize(), another.base.dequantize())
    qdora.save_adapter(other, tmp_path)
    assert read_adapter(tmp_path).base_kind == "nf4"


def test_the_mixtures_in_which_peft_takes_mlps_for_experts() -> None:
    taken = {kind for kind, pattern in _MODEL_TO_CONVERSION_PATTERN.items() if pattern == "qwen2_moe"}
    assert taken & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() == _TAKEN_IN
    assert _MOE_TARGET_MODULE_MAPPING["qwen2_moe"].keys() == {*_TAKEN_FOR_EXPERTS, "gate"}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_what_peft_would_mistake_is_said(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="qdora")
    say_once.cache_clear()
    base, mistaken = make_family(family, tmp_path / "base"), family == "deepseek_v3"

    def saved(**settings: Any) -> torch.Tensor:
        config = AdapterConfig(rank=4, alpha=8, **settings)
        model = qdora.load_model(base, adapter=config, load_in_4bit=False, dtype="float32")
        disturb(model)
        for _ in range(2):
            qdora.save_adapter(model, tmp_path / "adapter")
        return logits(model)

    def peft_s() -> torch.Tensor:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))

    saved(target_modules=("experts",))
    assert distance(saved(target_modules=("o_proj",)), peft_s()) < 1e-5
    assert not caplog.records
    ours = saved(use_dora=False)
    assert (distance(ours, peft_s()) > 1e-2) == mistaken
    ours = saved()
    if not mistaken:
        assert distance(ours, peft_s()) < 1e-5
        assert not caplog.records
        return
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora=True"):
        peft_s()
    (record,) = caplog.records
    assert re.fullmatch(
        r"qdora: PEFT takes the adapters of model\.layers\.\d\.mlp\.\S+_proj for those of the routed experts in a "
        r"deepseek_v3: merge, or leave MLPs out by --lora_target_modules",
        record.message,
    )
