"""A trainer from flags: what they become, and what does not fit together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback

import qdora
from qdora import ConfigError
from qdora.arguments import flags_of, parse_train
from qdora.assembly import build_trainer
from qdora.callbacks import KeepInputsOnHost, MeasureTheEnd, SaveAfterEpoch
from qdora.corpus import load_corpus
from qdora.movement import MovementWatch
from qdora.optimizer import CompensatedAdamW
from qdora.tokenizer import load_tokenizer
from tests.test_train import QUICK


def built(model: Path, data: Path, out: Path, **flags: Any) -> Any:
    settings = {**QUICK, "model_name_or_path": str(model), "dataset": str(data), "output_dir": str(out), **flags}
    run, training = parse_train(flags_of(settings))
    tokenizer = load_tokenizer(model)
    corpus = load_corpus(run, training, tokenizer)
    loaded = qdora.load_model(model, adapter=qdora.AdapterConfig(rank=2), device="cpu")
    return build_trainer(loaded, tokenizer, training, corpus, run, None)


def kinds(trainer: Any) -> set[type]:
    return {type(callback) for callback in trainer.callback_handler.callbacks}


def test_the_plain_run(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    trainer = built(tiny_nf4, pairs_file, tmp_path)
    assert kinds(trainer) >= {MovementWatch, SaveAfterEpoch}
    assert not kinds(trainer) & {MeasureTheEnd, KeepInputsOnHost, EarlyStoppingCallback}
    assert type(trainer.create_optimizer()) is CompensatedAdamW
    # What TRL would do is done here anyway, and the data is not as it wants it.
    assert not built(tiny_nf4, pairs_file, tmp_path, assistant_only_loss=True).args.assistant_only_loss
    assert trainer.model.training
    assert trainer.args.save_total_limit is None


def test_what_flags_add(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"eval_dataset": str(pairs_file), "eval_steps": 2, "early_stopping_patience": 3}
    trainer = built(tiny_nf4, pairs_file, tmp_path, activation_offloading=True, optim="sgd", **flags)
    assert kinds(trainer) >= {MeasureTheEnd, KeepInputsOnHost, EarlyStoppingCallback}
    assert not trainer.args.activation_offloading
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)


def test_what_does_not_fit_together(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    clash = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"selective": True}}
    with pytest.raises(ConfigError, match=r"these training flags do not fit together: "):
        built(tiny_nf4, pairs_file, tmp_path, **clash)


def test_an_optimizer_s_average_is_what_is_measured_and_saved(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    """A schedule-free one trains at one point, and finds another."""
    trainer, calls = built(tiny_nf4, pairs_file, tmp_path, eval_dataset=str(pairs_file)), []
    trainer.optimizer = SimpleNamespace(eval=lambda: calls.append("eval"))
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "adapter"))
    assert calls == ["eval", "eval"]
