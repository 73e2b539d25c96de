"""`save_pretrained` writes the adapter, whoever calls it."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import qdora
from qdora import AdapterConfig, ConfigError
from qdora.adapterfile import OFFSETS_FILE
from tests.conftest import disturb

IDS = torch.arange(3, 43)[None]


def test_the_adapter_and_nothing_else(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    disturb(model)
    model.save_pretrained(tmp_path / "a", max_shard_size="1GB")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *["adapter_config.json", "adapter_model.safetensors", OFFSETS_FILE]
    }
    again = qdora.load_model(tiny_nf4, adapter=tmp_path / "a")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()


def test_any_trainer_saves_the_adapter(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    settings = TrainingArguments(tmp_path / "out", max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    for place in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert not list(place.glob("model*.safetensors"))
        assert torch.equal(qdora.load_model(tiny_nf4, adapter=place)(IDS).logits, model.eval()(IDS).logits)


def test_what_a_stock_trainer_cannot_load_it_does_not_pass_over(tiny_nf4: Path, tmp_path: Path) -> None:
    """It knows adapters of a `PeftModel` only; going on in silence with fresh adapters would be worse."""

    def trainer(**more: Any) -> Trainer:
        model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
        settings = TrainingArguments(tmp_path, save_steps=1, report_to="none", use_cpu=True, **more)
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
        return Trainer(model, settings, train_dataset=rows, eval_dataset=rows)

    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    with pytest.raises((ValueError, OSError)):
        trainer(max_steps=1, **best).train()
    with pytest.raises((ValueError, OSError)):
        trainer(max_steps=2).train(resume_from_checkpoint=True)


def test_what_it_cannot_do_is_said(tiny_nf4: Path, tmp_path: Path) -> None:
    bare = qdora.load_model(tiny_nf4)
    with pytest.raises(ConfigError, match="no adapters to save"):
        bare.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"use model\.push_to_hub"):
        bare.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_the_model_is_still_of_its_class(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    disturb(model)
    assert isinstance(model, LlamaForCausalLM)
    assert (type(model).__name__, str(type(model))) == ("LlamaForCausalLM", str(LlamaForCausalLM))
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for twin in (copy.deepcopy(model), torch.load(pickled, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.lora_B.add_(1)
        twin.save_pretrained(tmp_path / "twin")
        saved = qdora.load_model(tiny_nf4, adapter=tmp_path / "twin")
        assert torch.equal(saved(IDS).logits, twin(IDS).logits)
