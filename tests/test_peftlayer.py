"""PEFT over our engine against PEFT alone: the same function in fp32, and everything that PEFT owns the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_with_peft import in_fp32
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import qdora
from qdora import ConfigError
from qdora.peftlayer import EngineLinear4bit

IDS = torch.arange(3, 43).view(2, 20)
CONFIGS: dict[str, dict[str, Any]] = {
    "dora": {},
    "lora": {"use_dora": False},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "some": {"target_modules": ["q_proj", "up_proj"]},
    "bias": {"bias": "lora_only"},
}


def peft_model(nf4: Path, engine: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """In train mode throughout: in eval mode bitsandbytes' own forward repacks weights on some CPUs."""
    base = AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.bfloat16).train()
    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear", **changes}
    config = LoraConfig(**settings)
    torch.manual_seed(0)
    model = get_peft_model(base, qdora.use_in_peft(config) if engine else config)
    return in_fp32(model) if dtype == torch.float32 else model


def take_over(model: Any, other: Any) -> None:
    """The trained values alone; bitsandbytes does not load its own state dict."""
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if ours.requires_grad:
                ours.copy_(theirs)


def trained(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_as_peft_does(name: str, tiny_nf4: Path) -> None:
    ours, theirs = (peft_model(tiny_nf4, engine, **CONFIGS[name]) for engine in (True, False))
    assert sum(isinstance(module, EngineLinear4bit) for module in ours.modules()) >= 4
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    start = logits(ours)
    assert distance(start, logits(theirs)) < 1e-3
    assert trained(ours) == pytest.approx(trained(theirs), rel=1e-3)
    assert distance(logits(ours), logits(theirs)) < 1e-2
    assert distance(logits(ours), start) > 0.1
    with ours.disable_adapter(), theirs.disable_adapter():
        assert distance(logits(ours), logits(theirs)) < 1e-5


def test_gradients_are_peft_s(tiny_nf4: Path) -> None:
    ours, theirs = peft_model(tiny_nf4, True), peft_model(tiny_nf4, False)
    trained(theirs)
    take_over(ours, theirs)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if a.requires_grad:
            assert distance(a.grad, b.grad) < 2e-3, name


@pytest.mark.parametrize("how", ["p", "eval"])
def test_dropout_that_is_turned_off_later_is_off(how: str, tiny_nf4: Path) -> None:
    ours, theirs = (peft_model(tiny_nf4, engine, lora_dropout=0.5) for engine in (True, False))
    trained(theirs)
    take_over(ours, theirs)
    logits(ours)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                if how == "p":
                    module.p = 0.0
                else:
                    module.eval()
    assert distance(logits(ours), logits(theirs)) < 1e-4
    assert torch.equal(logits(ours), logits(ours))


def test_in_bf16_it_is_as_near_to_the_truth_as_peft(tiny_nf4: Path, tmp_path: Path) -> None:
    truth = peft_model(tiny_nf4, False)
    trained(truth)
    truth.save_pretrained(tmp_path)
    expected, errors = logits(truth), {}
    for engine in (True, False):
        base = AutoModelForCausalLM.from_pretrained(tiny_nf4, dtype=torch.bfloat16).train()
        config = LoraConfig.from_pretrained(tmp_path)
        config = qdora.use_in_peft(config) if engine else config
        errors[engine] = distance(logits(PeftModel.from_pretrained(base, tmp_path, config=config).train()), expected)
    assert errors[True] < 1.1 * errors[False] < 5e-2


def test_saved_by_peft_read_by_both(tiny_nf4: Path, tmp_path: Path) -> None:
    model = peft_model(tiny_nf4, True)
    trained(model)
    model.save_pretrained(tmp_path)
    plain = in_fp32(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_nf4).train(), tmp_path).train())
    assert distance(logits(model), logits(plain)) < 1e-3
    assert distance(logits(qdora.load_model(tiny_nf4, tmp_path, dtype="float32")), logits(model)) < 1e-4


def test_eval_mode_and_generation_leave_the_weights_alone(tiny_nf4: Path) -> None:
    model = peft_model(tiny_nf4, True, torch.bfloat16)
    trained(model)
    expected = logits(model)
    model.eval()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(qdora.load_model(tiny_nf4, dtype="bfloat16")))
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert torch.equal(logits(model.train()), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_dropout_is_on_the_low_rank_path(tiny_nf4: Path) -> None:
    model = peft_model(tiny_nf4, True, lora_dropout=0.5)
    still = logits(model)
    assert torch.equal(still, logits(model)), "B is zero"
    trained(model)
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))


def test_merging_is_peft_s(tiny_nf4: Path) -> None:
    ours, theirs = peft_model(tiny_nf4, True), peft_model(tiny_nf4, False)
    trained(theirs)
    take_over(ours, theirs)
    before = logits(ours)
    for model in (ours, theirs):
        model.merge_adapter()
    merged = logits(ours)
    assert distance(merged, logits(theirs)) < 1e-5
    assert distance(merged, before) > 1e-2, "what 4 bits leave of an update"
    with ours.disable_adapter(), theirs.disable_adapter():
        assert distance(logits(ours), logits(theirs)) < 1e-5
    plain = peft_model(tiny_nf4, True)
    assert not any(isinstance(module, EngineLinear4bit) for module in plain.merge_and_unload().modules())


def test_several_adapters_one_at_a_time(tiny_nf4: Path) -> None:
    model = peft_model(tiny_nf4, True)
    trained(model)
    first = logits(model)
    model.add_adapter("second", model.peft_config["default"])
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert distance(logits(model), first) > 0.1
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="one active adapter, found default, second"):
        model(input_ids=IDS)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    with pytest.raises(ConfigError, match="one for each row"):
        model.eval()(input_ids=IDS, adapter_names=["default", "default"])


def test_a_base_that_bitsandbytes_repacked(tiny_nf4: Path) -> None:
    model = peft_model(tiny_nf4, True)
    layer = next(module for module in model.modules() if isinstance(module, EngineLinear4bit))
    layer.get_base_layer().weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match="bitsandbytes repacked its weights"):
        model(input_ids=IDS)
