"""Is the merged model the model that was trained? Both answer the same prompts, in fp32, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig

from qdora.architecture import Linears
from qdora.errors import NumericsError
from qdora.generation import end_tokens, generating_by
from qdora.model import load_model
from qdora.shards import ShardReader
from qdora.tokenizer import load_tokenizer

__all__ = ["PROMPTS", "Comparison", "compare", "fits_in_memory"]

PROMPTS = (
    "The capital of France is",
    "Question: A train travels 60 miles in 1.5 hours. What is its speed?\nAnswer:",
    "Dear Sir or Madam,",
    "def fibonacci(n):\n",
)
_NEW_TOKENS = 16
_KL_BOUND = 1e-2
"""Rounding W' to fp16 gives 1e-6 to 1e-5 on real models and to bf16 1e-4; a merge onto other weights, above 0.1."""


@dataclass(frozen=True)
class Comparison:
    """The merged model beside base plus adapter, both computed in fp32."""

    prompts: int
    largest_logit_difference: float
    kl_per_token: float
    """KL(adapter ‖ merged), the mean over the prompts' positions, in nats."""
    same_tokens: int
    """Greedy tokens that agree, until the first that does not."""
    greedy_tokens: int
    gaps_at_divergence: tuple[float, ...]
    """For each prompt whose greedy answers part: by how much the merged model prefers its token to the adapter's, in
    logits. A value near 0 is a tie that rounding decided."""

    def check(self, out: str | Path) -> None:
        """
        Raises:
            NumericsError: the two are further apart than rounding to 16 bits can bring them.
        """
        if not self.kl_per_token <= _KL_BOUND:  # NaN too
            raise NumericsError(
                f"the merged model is not the one that was trained: KL {self.kl_per_token:.3g} a token, "
                f"{self.same_tokens} of {self.greedy_tokens} greedy tokens the same; {out} was not written. Was the "
                "adapter trained on this base? --no_verify writes it nevertheless"
            )

    def __str__(self) -> str:
        text = (
            f"verified on {self.prompts} prompts in fp32: largest logit difference "
            f"{self.largest_logit_difference:.4f}, KL {self.kl_per_token:.2e} a token, "
            f"{self.same_tokens} of {self.greedy_tokens} greedy tokens the same"
        )
        if self.gaps_at_divergence:
            gap = max(self.gaps_at_divergence)
            text += (
                f"; {len(self.gaps_at_divergence)} answers part, where the tokens are {gap:.3f} logits apart or less"
            )
        return text


def compare(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    *,
    load_in_4bit: bool = True,
    trust_remote_code: bool = False,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = _NEW_TOKENS,
) -> Comparison:
    """Run the prompts through base + adapter and through the merged model, on the CPU, one after the other.

    Args:
        load_in_4bit: whether the adapter was merged onto NF4 weights; a 16-bit `base` is quantized then.
    """
    tokenizer = load_tokenizer(merged, trust_remote_code)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]

    def load(path: str | Path, adapter: str | Path | None, in_4bit: bool) -> Any:
        return load_model(
            path,
            adapter,
            dtype="float32",
            device="cpu",
            load_in_4bit=in_4bit,
            trust_remote_code=trust_remote_code,
            allow_other_base=True,  # whoever merged has decided that
        )

    trained = load(base, adapter, load_in_4bit)
    ends = end_tokens(trained, tokenizer)
    ours = _answers(trained, ids, new_tokens, ends)
    del trained
    plain = load(merged, None, False)
    theirs = _answers(plain, ids, new_tokens, ends)
    kl = difference = 0.0
    positions = same = total = 0
    gaps = []
    for prompt, (p_logits, p_tokens), (q_logits, q_tokens) in zip(ids, ours, theirs, strict=True):
        p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        positions += len(p)
        difference = max(difference, float((p_logits - q_logits).abs().max()))
        common = _common_prefix(p_tokens, q_tokens)
        same += common
        total += max(len(p_tokens), len(q_tokens))
        if common < min(len(p_tokens), len(q_tokens)):
            gaps.append(_gap(plain, prompt, q_tokens[:common], q_tokens[common], p_tokens[common]))
    return Comparison(len(ids), difference, kl / positions, same, total, tuple(gaps))


def fits_in_memory(reader: ShardReader, linears: Linears) -> bool:
    """Whether the model in fp32, with room to work in, fits in the memory that is free now."""
    values = sum(rows * columns for rows, columns in linears.shapes.values())
    others = sum(reader.nbytes(key) for key in reader if linears.find(key) is None)
    return 4 * values + 2 * others < 0.6 * psutil.virtual_memory().available


@torch.no_grad()
def _answers(model: Any, prompts: Sequence[Tensor], new_tokens: int, ends: list[int]) -> list[tuple[Tensor, list[int]]]:
    """For each prompt its logits, (length, vocabulary), and the greedy tokens that follow, up to one of the ends."""
    model.eval()
    pad = model.generation_config.pad_token_id
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    answers = []
    for ids in prompts:
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].cpu()
        with generating_by(model, config):
            tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append((logits, tokens[0, ids.shape[1] :].tolist()))
    return answers


@torch.no_grad()
def _gap(model: Any, prompt: Tensor, answer: Sequence[int], chosen: int, other: int) -> float:
    """By how many logits the model prefers one token to another after the prompt and the beginning of its answer."""
    ids = torch.cat([prompt, torch.tensor([answer], dtype=prompt.dtype)], dim=1).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    return float(logits[chosen] - logits[other])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
