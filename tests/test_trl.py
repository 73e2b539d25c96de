"""TRL's own trainers over a model of ours: a few real steps on the first layers of SmolLM2, all of it under `-m slow`.

What is watched besides the loss: that the reference is the base (by its log-probabilities), that no trainer makes a
second model, and what a trainer leaves on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import qdora
from qdora.optimizer import CompensatedAdamW
from qdora.peftlayer import EngineLinear4bit
from tests.conftest import disturb

COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
QUESTIONS = [f"Question: What is {i} plus {i}?\nAnswer:" for i in range(8)]


@pytest.fixture(params=["start", pytest.param("whole", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("smollm2_start" if request.param == "start" else "smollm2_nf4")


@pytest.fixture
def model(base: Path) -> Any:
    torch.manual_seed(0)
    return qdora.load_model(base, adapter=qdora.AdapterConfig(rank=8, alpha=16))


@pytest.fixture
def models_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the models that are built from here on."""
    made: list[str] = []
    init = PreTrainedModel.__init__

    def noted(self: Any, *inputs: Any, **named: Any) -> None:
        made.append(type(self).__name__)
        init(self, *inputs, **named)

    monkeypatch.setattr(PreTrainedModel, "__init__", noted)
    return made


def trained_values(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def all_moved(before: list[torch.Tensor], model: Any) -> bool:
    return all(not torch.equal(a, b) for a, b in zip(before, trained_values(model), strict=True))


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The eight likeliest tokens, one after the other, in eval mode and without checkpointing."""
    batch = tokenizer(question, return_tensors="pt")
    tokens = model.eval().generate(**batch, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_sft(model: Any, base: Path, tmp_path: Path, models_made: list[str]) -> None:
    before = trained_values(model)
    rows = Dataset.from_list([{"prompt": q, "completion": f" It is {2 * i}."} for i, q in enumerate(QUESTIONS)])
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), max_steps=3, max_length=64, **COMMON),
        train_dataset=rows,
        processing_class=qdora.load_tokenizer(base),
        optimizer_cls_and_kwargs=(CompensatedAdamW, {"lr": 1e-3}),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all_moved(before, model)
    assert isinstance(trainer.optimizer.optimizer, CompensatedAdamW)
    assert not models_made
    trainer.save_model()
    ids = torch.arange(100, 116)[None]
    assert torch.equal(qdora.load_model(base, adapter=tmp_path)(ids).logits, model.eval()(ids).logits)


def test_dpo_refers_to_the_base(model: Any, base: Path, tmp_path: Path, models_made: list[str]) -> None:
    disturb(model)
    before = trained_values(model)
    rows = [{"prompt": q, "chosen": f" It is {2 * i}.", "rejected": " No idea."} for i, q in enumerate(QUESTIONS)]
    reference = qdora.reference_model(model)
    seen: list[tuple[dict[str, Any], Any]] = []
    reference.register_forward_hook(lambda _, __, named, out: seen.append((named, out)), with_kwargs=True)
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(str(tmp_path), max_steps=2, max_length=64, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=qdora.load_tokenizer(base),
        optimizers=(CompensatedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), None),
    )
    trainer.train()
    assert all_moved(before, model)
    assert not models_made
    assert len(seen) == 2
    for named, out in seen:
        same_as_base(out, named, base)
    with torch.no_grad():
        scored, expected = scores(model(**seen[0][0]), seen[0][0]), scores(seen[0][1], seen[0][0])
    assert not torch.allclose(scored, expected, atol=0.1)


def test_grpo_refers_to_the_base(model: Any, base: Path, tmp_path: Path, models_made: list[str]) -> None:
    """And samples as the model answers: `top_k=1` leaves it no choice."""
    disturb(model)
    before, tokenizer = trained_values(model), qdora.load_tokenizer(base)
    answers: list[dict[str, str]] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        answers.append(dict(zip(prompts, completions, strict=True)))
        return [0.0, 1.0]

    expected = {question: answer(model, tokenizer, question) for question in QUESTIONS[:3]}
    settings = GRPOConfig(str(tmp_path), max_steps=2, num_generations=2, max_completion_length=8, top_k=1, **COMMON)
    rows = Dataset.from_list([{"prompt": question} for question in QUESTIONS[:3]])
    trainer = GRPOTrainer(model, reward, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.ref_model, trainer.beta = qdora.reference_model(model), 0.04
    seen: list[tuple[dict[str, Any], Any]] = []
    trainer.ref_model.register_forward_hook(lambda _, __, named, out: seen.append((named, out)), with_kwargs=True)
    trainer.train()
    assert all_moved(before, model)
    assert not models_made
    assert all(expected[question] == found for question, found in answers[0].items())
    assert [entry["kl"] > 0 for entry in trainer.state.log_history if "kl" in entry] == [True, True]
    for named, out in seen:
        same_as_base(out, named, base)


def scores(out: Any, named: dict[str, Any]) -> torch.Tensor:
    """The log-probabilities of the tokens with labels, whether TRL computes them from logits or without."""
    labels = named["labels"][:, 1:]
    return out.log_probs[labels != -100]


def same_as_base(out: Any, named: dict[str, Any], base: Path) -> None:
    with torch.no_grad():
        logits = qdora.load_model(base)(named["input_ids"], attention_mask=named["attention_mask"]).logits
    expected = logits[:, :-1].float().log_softmax(-1).gather(-1, named["input_ids"][:, 1:, None])[..., 0]
    assert torch.allclose(scores(out, named), expected[named["labels"][:, 1:] != -100], atol=0.02)


def test_dpo_by_peft_on_our_engine(base: Path, tmp_path: Path) -> None:
    """TRL knows a `PeftModel`'s reference itself: a fresh adapter is as good as the base, to both."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).train()
    config = LoraConfig(r=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"prompt": q, "chosen": f" It is {2 * i}.", "rejected": " No idea."} for i, q in enumerate(QUESTIONS)]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), max_steps=2, max_length=64, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=qdora.load_tokenizer(base),
        peft_config=qdora.use_in_peft(config),
    )
    engines = [module for module in trainer.model.modules() if isinstance(module, EngineLinear4bit)]
    assert len(engines) == 7 * model.config.num_hidden_layers
    before = trained_values(trainer.model)
    trainer.train()
    assert all_moved(before, trainer.model)
    first = next(entry for entry in trainer.state.log_history if "rewards/chosen" in entry)
    assert abs(first["rewards/chosen"]) < 0.02
