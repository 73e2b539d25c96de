"""A model and the loss of its answers behind one forward.

DDP and FSDP2 see a model only through the forward of what they wrap: that is where they gather parameters and prepare
for the gradients. A loss without all the logits needs the hidden states and the head's weight, which are not what a
causal model's forward returns. So what is wrapped is this module, and the loss is computed within its forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from qdora.arithmetic import place_of
from qdora.loss import answer_loss, nll_by_row, positions_at_once, summed_by_row

__all__ = ["ScoredModel"]


class ScoredModel(nn.Module):
    """A causal language model whose forward returns the summed loss of the answers, or what the model returns.

    Args:
        model: a transformers model.
        chunk_bytes: of the logits that exist at once, in the head's dtype; None for what suits the device.
    """

    def __init__(self, model: Any, chunk_bytes: int | None = None) -> None:
        super().__init__()
        self.model, self.chunk_bytes = model, chunk_bytes
        # DDP's own attribute: what it need not send around, for it is frozen and every process has loaded it.
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        names = [name for name, _ in [*self.named_parameters(), *self.named_buffers()]]
        self._ddp_params_and_buffers_to_ignore = [name for name in names if name not in trained]

    def forward(self, lean: bool = False, by_row: bool = False, **inputs: Any) -> Any:
        """
        Args:
            lean: return Σ −log p over the answers' tokens, an fp32 scalar, without all the logits.
            by_row: return Σ −log p of each row, (batch,) fp32, without gradients; `lean` or by way of all the logits.
            inputs: the model's own, `labels` (batch, length) among them.
        """
        if not lean and not by_row:
            return self.model(**inputs)
        features = {name: value for name, value in inputs.items() if name != "labels"}
        if not lean:
            return _nll_of_logits(self.model(**features, use_cache=False).logits, inputs["labels"], self.chunk_bytes)
        hidden: Tensor = self.model.base_model(**features, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        loss = nll_by_row if by_row else answer_loss
        return loss(hidden, head.weight, inputs["labels"], head.bias, self.chunk_bytes)

    @torch.no_grad()
    def head_is_plain(self) -> bool:
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
        try:
            ids = torch.tensor([[0, 1]], device=place_of(model))
            hidden: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            if hidden.dtype != head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
                return False  # Mamba's hidden states are fp32, and its head's input is rounded
            return torch.equal(functional.linear(hidden, head.weight, head.bias), logits)
        finally:
            model.train(was_training)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it a sharded model's gradients are not reduced: for all micro-batches of a step but the last."""
        if not isinstance(self, FSDPModule):
            yield
            return
        self.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.set_requires_gradient_sync(True)


@torch.no_grad()
def _nll_of_logits(logits: Tensor, labels: Tensor, chunk_bytes: int | None) -> Tensor:
    """Σ −log p of each row, (batch,) fp32, of logits (batch, length, vocabulary) that are all there."""

    def of_chunk(logits_TV: Tensor, label_T: Tensor) -> Tensor:
        return functional.cross_entropy(logits_TV.float(), label_T, reduction="none")

    at_once = positions_at_once(logits.shape[-1], torch.float32, logits.device, chunk_bytes)
    return summed_by_row(of_chunk, logits, labels, at_once)
