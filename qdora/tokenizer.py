"""The tokenizer to use: the model's, or the one that an adapter brings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qdora.errors import CheckpointError, DataError, shown
from qdora.output import SETTINGS_FILE, TEMPLATE_FILE
from qdora.sources import local_model, unusable

__all__ = [
    "check_ids",
    "kind_of_tokens",
    "load_tokenizer",
    "template_beside",
    "tokenizer_of",
    "use_template",
]


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, fetch_weights: bool = True
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        fetch_weights: False fetches nothing but the tokenizer of a Hub id.

    Raises:
        CheckpointError: there is none that can be read.
    """
    source = local_model(path) if fetch_weights or Path(path).exists() else path
    return _usable(source, path, trust_remote_code)


def tokenizer_of(
    model: str | Path, adapter: str | Path | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer for a model with an adapter, and whose it is in words: `the adapter` or `the model`.

    The adapter's, if it brings a chat template: training may have used another than the model's.

    Raises:
        CheckpointError: there is none that can be read.
    """
    if adapter is None or template_beside(adapter) is None:
        return load_tokenizer(model, trust_remote_code), "the model"
    return _usable(Path(adapter), adapter, trust_remote_code), "the adapter"


def template_beside(adapter: str | Path) -> str | None:
    """The chat template of the tokenizer that lies beside an adapter, if it has one: in it the adapter was trained."""
    directory = Path(adapter)
    try:
        settings = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
        if (directory / TEMPLATE_FILE).is_file():
            return (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
        found = settings.get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if isinstance(found, list):  # several by their names
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


def kind_of_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What differs between tokenizers that give different tokens: vocabulary, special tokens, how a text begins."""
    special = tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, set(tokenizer.all_special_tokens)
    return tokenizer.get_vocab(), *special, tokenizer("a b").input_ids


def _usable(source: str | Path, named: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that lies at `source`, called `named` in errors; with something to pad with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer("a b")  # some of what is wrong shows only in use
    except Exception as error:
        # tokenizer files fail in as many ways as there are kinds of tokenizers
        raise unusable(named, "tokenizer", error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_ids(model: Any, tokenizer: Any, rows: Iterable[Sequence[int]], whose: str = "the model") -> None:
    """That the model has embeddings of the tokens in use. Not of all that there are: some models leave out the unused.

    Raises:
        CheckpointError: a token without one.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    largest = max((max(row) for row in rows if row), default=-1)
    if largest >= embeddings:
        token = shown(str(tokenizer.convert_ids_to_tokens(largest)))
        raise CheckpointError(
            f"the tokenizer of {whose} gives token {largest} ({token}), and the model has {embeddings} embeddings; "
            "use the tokenizer that belongs to the model"
        )


def use_template(tokenizer: Any, file: str | Path | None) -> None:
    """Let a Jinja file be the tokenizer's chat template, if one is named.

    Raises:
        DataError: it does not exist, or is no text.
    """
    if file is None:
        return
    path = Path(file)
    if not path.is_file():
        raise DataError(f"no chat template at {path}: name a Jinja file")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"the chat template {path} is not UTF-8 text; name a Jinja file") from None
