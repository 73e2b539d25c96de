"""What every generation here shares: a config that is the whole truth, where the inputs go, and what ends an answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from transformers import GenerationConfig, LogitsProcessor

from qdora.errors import ConfigError, NumericsError, reason
from qdora.sources import quietly
from qdora.templates import render

__all__ = ["RefuseNaN", "end_tokens", "ends_of", "generating_by", "render_chat"]


@contextmanager
def generating_by(model: Any, config: GenerationConfig) -> Iterator[GenerationConfig]:
    """Within it `generate` goes by this config alone, and warns of nothing.

    What a given config leaves open, transformers takes from the model's own: penalties, banned words, another sampling.
    """
    own, model.generation_config = model.generation_config, config
    try:
        with quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield config
    finally:
        model.generation_config = own


class RefuseNaN(LogitsProcessor):
    """The likeliest of NaNs is a token too, and would be shown as an answer."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool(scores.isnan().any()):
            raise NumericsError("the model's logits are not finite; try --dtype bfloat16 or float32")
        return scores


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], ask: bool = True) -> str:
    """Messages as text, through the tokenizer's template; with `ask`, up to where an answer begins.

    Raises:
        ConfigError: the template refuses them.
    """
    try:
        return render(tokenizer, messages, ask=ask)
    except Exception as error:
        # jinja raises its own errors, and templates raise what they like
        raise ConfigError(f"the chat template refuses this: {reason(error)}") from None


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: those of the model's own config, and `ends_of` the tokenizer."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {*ends_of(tokenizer), *(own if isinstance(own, list) else [own])}
    return sorted(token for token in ends if token is not None)


def ends_of(tokenizer: Any) -> list[int]:
    """The tokenizer's own end, and the token that ends an answer in its template.

    The latter matters where a base model was trained to chat: its EOS is still the one that ends a document.
    """
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        with suppress(ConfigError):
            said = "qdora"
            turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
            after = render_chat(tokenizer, turn, ask=False).rpartition(said)[2]
            first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
            ends.update(token for token in first if token in tokenizer.added_tokens_decoder)
    return sorted(token for token in ends if token is not None)
