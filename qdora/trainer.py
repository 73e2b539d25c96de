"""TRL's trainer, told what is different about our models: how they are saved and loaded, and a loss that is lean."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from qdora.checkpoint import load_adapter, save_adapter
from qdora.loss import CHUNK_BYTES, IGNORED, answer_loss
from qdora.offload import HostInputs

__all__ = ["AdapterTrainer", "KeepInputsOnHost"]


class AdapterTrainer(SFTTrainer):
    """`SFTTrainer` whose checkpoints hold the adapter (in PEFT's format, offsets exact) instead of the model."""

    loss_chunk_bytes = CHUNK_BYTES
    """Of the fp32 logits that exist at once."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the answers' tokens; over all micro-batches of a step, if the trainer counted them.

        A wrapped model (DDP, FSDP) must be entered through its wrapper, and other losses than the plain one are TRL's:
        slower. A head that does more than multiply is left to the model's own loss, with all its logits.
        """
        if return_outputs or model is not self.model or self._other_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._head_is_plain:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        features = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = model.base_model(**features, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        total = answer_loss(hidden, head.weight, labels, head.bias, self.loss_chunk_bytes)
        tokens = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(tokens).clamp(min=1)

    @cached_property
    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Whether the logits are the head's product with the last hidden states, tried out on two tokens.

        Many families do more: scale them (Cohere, Granite), cap them (Gemma 2), and each has its own name for it.
        """
        model = self.model
        head, backbone = model.get_output_embeddings(), model.base_model
        # Capping shows only on large logits, and a model may not have them yet.
        caps = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if head is None or backbone is model or caps:
            return False
        was_training = model.training
        model.eval()
        ids = torch.tensor([[0, 1]], device=model.device)
        hidden: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
        same = torch.equal(
            functional.linear(hidden, head.weight, head.bias), model(input_ids=ids, use_cache=False).logits
        )
        model.train(was_training)
        return same

    def _other_loss(self) -> bool:
        # `aux_loss_enabled` is newer than the oldest TRL that fits: the load balancing of mixtures of experts.
        balances = getattr(self, "aux_loss_enabled", False)
        return self.label_smoother is not None or self.args.loss_type != "nll" or balances

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        is_checkpoint = directory != Path(self.args.output_dir)
        save_adapter(self.model, directory, exact_offsets=is_checkpoint)
        self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint)


class KeepInputsOnHost(TrainerCallback):
    """Lets the layers' inputs wait on the host, once the trainer has enabled gradient checkpointing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        HostInputs(self._device).install(model)
