"""The tokenizer to use: the model's, or the one that an adapter brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qdora.errors import CheckpointError
from qdora.sources import local_model, unusable

__all__ = ["check_vocabulary", "load_tokenizer", "tokenizer_of"]


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, fetch_weights: bool = True
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        fetch_weights: False fetches nothing but the tokenizer of a Hub id.

    Raises:
        CheckpointError: there is none that can be read.
    """
    try:
        source = local_model(path) if fetch_weights or Path(path).exists() else str(path)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer("a b")  # some of what is wrong shows only in use
    except CheckpointError:
        raise
    except Exception as error:
        # tokenizer files fail in as many ways as there are kinds of tokenizers
        raise unusable(path, "tokenizer", error) from None
    return _padding(tokenizer)


def tokenizer_of(
    model: str | Path, adapter: str | Path | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer for a model with an adapter, and whose it is in words: `the adapter` or `the model`.

    The adapter's, if it brings a chat template: training may have used another than the model's.
    """
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(Path(adapter), trust_remote_code=trust_remote_code)
            tokenizer("a b")
        except Exception as error:
            # tokenizer files fail in as many ways as there are kinds of tokenizers
            raise unusable(adapter, "tokenizer", error) from None
        if tokenizer.chat_template:
            return _padding(tokenizer), "the adapter"
    return load_tokenizer(model, trust_remote_code), "the model"


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With something to pad with."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any, whose: str) -> None:
    """
    Raises:
        CheckpointError: the tokenizer has a token that the model has no embedding of.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise CheckpointError(f"the tokenizer of {whose} has tokens up to {largest}, and the model {rows} embeddings")
