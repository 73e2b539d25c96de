"""Whether rows that are laid end to end stay apart, found out by trying.

Packing and padding-free batches lay rows end to end in one sequence, without an attention mask; where each begins is
told only by the positions, which start again at 0. Most attentions of transformers read that and mask what lies before.
Recurrent and convolving layers do so only with kernels of their own, several models not at all, and those say nothing:
they would train on mixed-up rows. A list of names would be wrong with the next release.

So two short rows go through the model, and the second row's logits are asked for their gradient with respect to the
first row's embeddings. What a row does not see has a gradient of exactly 0, in any precision, in whatever order sums
are taken; so no threshold is needed, and there is none that would do. Comparing logits, with the first row changed or
left away, was tried: a Jamba whose every other layer leaks changes them by 0.3 % of what full sight would, which is
less than the rounding of bf16, and an LFM2 in bf16 by nothing, while a mixture of experts, which leaks nothing, rounds
otherwise because its tokens are grouped otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdora.arithmetic import place_of
from qdora.distributed import say
from qdora.errors import ConfigError, out_of_memory, reason

__all__ = ["check_rows_apart", "joins_rows", "rows_stay_apart", "settle_packing", "splits_rows"]

_Collate = Callable[[list[dict[str, list[int]]]], dict[str, Any]]
"""Makes one sequence of rows (`input_ids`, `labels`), as the trainer's data collator does."""

_LENGTHS = (7, 6)  # longer than what a convolution of these families reaches over


def settle_packing(training: Any) -> None:
    """Let TRL's settings say how rows are laid into batches, given that they are tokenized, masked and cut already.

    Args:
        training: TRL's `SFTConfig`, changed in place.

    Raises:
        ConfigError: flags that TRL would take, and mix up rows.
    """
    if training.packing:
        if training.packing_strategy == "wrapped":
            say("packing wrapped: a row sees those before it in its sequence, and may be cut; bfd keeps rows apart")
        return
    if training.eval_packing:
        raise ConfigError("--eval_packing true packs rows as --packing does, which is off; turn it on, or leave it out")
    training.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
    if training.padding_free:
        training.max_length = None  # TRL cannot cut such rows, and refuses to be asked to


def splits_rows(training: Any, evaluation: bool = False) -> bool:
    """Whether the rest of a row longer than `max_length` goes on in another pack, rather than being left out."""
    return _packs(training, evaluation) and training.packing_strategy != "bfd"


def joins_rows(training: Any, evaluation: bool = False) -> bool:
    """Whether a row sees the one before it, which predicts its first token."""
    return _packs(training, evaluation) and training.packing_strategy == "wrapped"


def _packs(training: Any, evaluation: bool) -> bool:
    return bool(training.packing) and not (evaluation and training.eval_packing is False)


def check_rows_apart(scored: Any, collate: _Collate) -> None:
    """That a model keeps apart the rows of one sequence.

    Args:
        scored: a `ScoredModel`.
        collate: as in training.

    Raises:
        ConfigError: it does not, or its forward does not take what tells them apart.
    """
    model = scored.model
    name, attention = type(model).__name__, getattr(model.config, "_attn_implementation", None)
    try:
        apart = rows_stay_apart(scored, collate)
    except Exception as error:
        if out_of_memory(error):
            raise
        # a model's own code may fail in any way on inputs that it does not know
        raise ConfigError(
            f"{name} does not run on rows laid end to end: {reason(error)}; leave out --packing and --padding_free"
        ) from None
    if not apart:
        raise ConfigError(
            f"packing would let rows see each other: {name} with {attention} attention does not keep apart rows that "
            "are laid end to end; leave out --packing and --padding_free"
        )


@torch.enable_grad()
def rows_stay_apart(scored: Any, collate: _Collate) -> bool:
    """The question of `check_rows_apart`, tried out on two rows; leaves no gradients in the model."""
    embedding = scored.model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    first, second = ([(step * i + 1) % vocabulary for i in range(n)] for step, n in zip((3, 5), _LENGTHS, strict=True))
    seen: list[Tensor] = []

    def begin_here(module: Any, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle, was_training = embedding.register_forward_hook(begin_here), scored.training
    scored.eval()
    try:
        inputs = _on(place_of(scored.model), collate([{"input_ids": row, "labels": row} for row in (first, second)]))
        logits = scored(**inputs, use_cache=False).logits[0, len(first) : len(first) + len(second)]
        # A plain sum may be the same whatever the logits are (a norm's outputs always sum to 0).
        (gradient,) = torch.autograd.grad(logits.float().square().sum(), seen[:1])
    finally:
        handle.remove()
        scored.train(was_training)
    return not (gradient[0, : len(first)] != 0).any()


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without its labels, on the device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
