"""A trainer for one run, put together from its flags."""

from __future__ import annotations

from typing import Any

import torch

from qdora.arguments import rates
from qdora.corpus import Corpus
from qdora.data import EncodedData
from qdora.errors import ConfigError, out_of_memory, reason
from qdora.flags import OWN_OPTIMIZERS, RunArguments
from qdora.movement import MovementWatch
from qdora.optimizer import CompensatedAdamW
from qdora.packing import settle_packing
from qdora.sharding import Sharding
from qdora.shards import parse_size

__all__ = ["build_trainer"]


def build_trainer(
    model: Any,
    tokenizer: Any,
    training: Any,
    corpus: Corpus,
    run: RunArguments,
    sharding: Sharding | None,
) -> Any:
    """An `AdapterTrainer` over the model and the data, as the flags say.

    Args:
        sharding: of the model, if it is sharded.

    Raises:
        ConfigError: flags that do not fit together.
    """
    from datasets import Dataset

    from qdora.trainer import AdapterTrainer

    def dataset(encoded: EncodedData) -> Dataset:
        return Dataset.from_dict({"input_ids": encoded.input_ids, "labels": encoded.labels})

    callbacks, keep = _callbacks(training, run), training.save_total_limit
    _settle(training)
    model.train()
    try:
        return AdapterTrainer(
            model=model,
            args=training,
            train_dataset=dataset(corpus.data),
            eval_dataset=None if corpus.evaluation is None else dataset(corpus.evaluation),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=_own_optimizer(training),
            callbacks=callbacks,
            chunk_bytes=None if run.loss_chunk_size is None else parse_size(run.loss_chunk_size),
            sharding=sharding,
            rates=rates(run, training),
            asked=corpus.asked,
            skips_nonfinite=run.on_nonfinite == "skip",
            keep=keep,
        )
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"these training flags do not fit together: {reason(error)}") from None


def _callbacks(training: Any, run: RunArguments) -> list[Any]:
    from transformers import EarlyStoppingCallback

    from qdora.callbacks import KeepInputsOnHost, MeasureTheEnd, SaveAfterEpoch

    callbacks: list[Any] = [MovementWatch(), SaveAfterEpoch()]
    if run.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run.early_stopping_patience, run.early_stopping_threshold))
    if training.load_best_model_at_end and training.eval_strategy == "steps":
        callbacks.append(MeasureTheEnd())
    if training.activation_offloading:
        callbacks.append(KeepInputsOnHost(training.device))
    return callbacks


def _settle(training: Any) -> None:
    """Take from the trainer's arguments, in place, what is done here in another way."""
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.activation_offloading = False  # TRL would offload whatever is saved
    training.save_total_limit = None
    training.assistant_only_loss = False  # as it is here without being asked for
    settle_packing(training)
    if getattr(training, "router_aux_loss_coef", 0.0) is None:
        # Newer TRL balances a mixture's experts by default, for which all logits must be there; but routers are frozen.
        training.router_aux_loss_coef = 0.0


def _own_optimizer(training: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """AdamW means ours, which trains bf16 as if it were fp32; any other name is the trainer's."""
    if training.optim not in OWN_OPTIMIZERS:
        return None
    betas = (training.adam_beta1, training.adam_beta2)
    return CompensatedAdamW, {"lr": training.learning_rate, "betas": betas, "eps": training.adam_epsilon}
