"""TRL's trainer, told what is different about our models: how they are saved and loaded, and a loss that is lean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from trl import SFTTrainer

from qdora.checkpoint import load_adapter, save_adapter
from qdora.loss import answer_loss

__all__ = ["AdapterTrainer"]

# What some families do to the logits after the head (Gemma 2, Cohere, Granite, Falcon-H1, …).
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "output_router_logits",
)


class AdapterTrainer(SFTTrainer):
    """`SFTTrainer` whose checkpoints hold the adapter (in PEFT's format, offsets exact) instead of the model."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the answers' tokens; over all micro-batches of a step, if the trainer counted them.

        A wrapped model (DDP, FSDP) must be entered through its wrapper, and a head that changes its logits is left to
        TRL's loss: slower, and the same number.
        """
        if return_outputs or model is not self.model or not self._plain_head() or self._smooths_or_weights():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        features = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = model.base_model(**features, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        total = answer_loss(hidden, head.weight, labels, head.bias)
        tokens: Tensor | int = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / tokens

    def _plain_head(self) -> bool:
        config = self.model.config.get_text_config()
        return not any(getattr(config, name, None) for name in _LOGIT_CHANGES)

    def _smooths_or_weights(self) -> bool:
        return self.label_smoother is not None or self.args.loss_type != "nll"

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
