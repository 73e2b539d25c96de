"""One voice of a chat: what was said so far, and the next answer as a stream of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from qdora.architecture import context_of
from qdora.arithmetic import place_of
from qdora.errors import ConfigError
from qdora.generation import RefuseNaN, end_tokens, generating_by, render_chat
from qdora.inject import adapters_disabled
from qdora.tokenizer import check_ids

__all__ = ["Answer", "Conversation", "Sampling"]

_UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


_COLDEST = 1e-3  # logits divided by less may be infinite


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen, whatever the model's own generation config asks for."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """With the number of the question it decides what is drawn, so that two voices draw alike."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 (greedy) or more, found {self.temperature}")
        if 0 < self.temperature < _COLDEST:
            raise ConfigError(f"temperature must be 0 (greedy) or at least {_COLDEST:g}, found {self.temperature:g}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be at least 0 and below 2^63, found {self.seed}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, found {self.top_p}")

    def config(self, room: int, ends: Sequence[int], pad: int | None) -> GenerationConfig:
        """transformers' description of it, for an answer of at most `room` tokens."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        return GenerationConfig(
            max_new_tokens=min(room, self.max_new_tokens),
            do_sample=bool(self.temperature),
            use_cache=True,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            **drawn,
        )


@dataclass(frozen=True)
class Answer:
    """What a voice said."""

    text: str
    tokens: int
    stopped: bool
    """Somebody did not want to hear the rest."""
    cut: bool
    """It was as long as it may be, and did not end by itself."""
    forgotten: int
    """Turns that had to be forgotten to make room."""


class Conversation:
    """One voice: its history, and its next answer.

    Without a chat template (a base model) each question is continued as it stands, and there is no history.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        system: str | None = None,
        use_adapter: bool = True,
        whose: str = "the model",
    ) -> None:
        """
        Args:
            model: with `generate`, in eval mode.
            use_adapter: False switches the model's adapters off while this voice answers.
            whose: the tokenizer is, in words, as `tokenizer_of` says it.

        Raises:
            ConfigError: the chat template takes no system message, or there is none.
        """
        self.model, self.tokenizer, self.sampling, self.use_adapter = model, tokenizer, sampling, use_adapter
        self._whose = whose
        self.system: str | None = None
        self.turns: list[tuple[str, str]] = []
        """Questions and answers, the oldest first."""
        self._ends = end_tokens(model, tokenizer)
        self._asked = 0
        self.set_system(system)

    def forget(self) -> None:
        """Begin anew; the system message stays."""
        self.turns = []

    def set_system(self, text: str | None) -> None:
        """
        Raises:
            ConfigError: the chat template takes no system message; the earlier one stays.
        """
        if text and not self.tokenizer.chat_template:
            raise ConfigError("this model has no chat template, so there is no place for a system message")
        if text:
            render_chat(self.tokenizer, _messages(text, [], "?"))
        self.system = text or None

    def ask(
        self, question: str, write: Callable[[str], None] | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Answer a question, and remember both. An answer that was stopped is remembered as far as it went.

        Args:
            write: gets the answer piece by piece as it comes.
            stopped: asked after each token; True ends the answer.

        Raises:
            ConfigError: the question alone is longer than what the model takes, or the template refuses it; it is not
                remembered.
            CheckpointError: it has a token that the model has no embedding of.
            NumericsError: the model's logits are not finite.
        """
        turns, ids, room = self._fit(question)
        check_ids(self.model, self.tokenizer, [ids], self._whose)
        stream = _Stream(self.tokenizer, self._ends, write or (lambda piece: None), stopped)
        torch.manual_seed(self.sampling.seed + self._asked)
        self._asked += 1
        with nullcontext() if self.use_adapter else adapters_disabled(self.model):
            length = _generate(self.model, ids, self.sampling.config(room, self._ends, self._pad()), stream, stopped)
        forgotten = len(self.turns) - len(turns)
        self.turns = [*turns, (question, stream.text)] if self.tokenizer.chat_template else []
        by_itself = stream.last in self._ends
        was_stopped = stopped() and not by_itself
        return Answer(stream.text, length, was_stopped, not (by_itself or was_stopped), forgotten)

    def _fit(self, question: str) -> tuple[list[tuple[str, str]], list[int], int]:
        """The turns that may stay, the prompt's tokens, and how many tokens are left for the answer.

        The oldest turns go until the longest answer has room, but no more than half of all.
        """
        turns, limit = list(self.turns), context_of(self.model.config)
        while True:
            ids = self._prompt(turns, question)
            if limit is None:
                return turns, ids, self.sampling.max_new_tokens
            if not turns or limit - len(ids) >= min(self.sampling.max_new_tokens, limit // 2):
                break
            del turns[0]
        if len(ids) >= limit:
            raise ConfigError(f"the question is {len(ids):,} tokens long and the model takes {limit:,}; shorten it")
        return turns, ids, limit - len(ids)

    def _prompt(self, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
        if not self.tokenizer.chat_template:
            ids: list[int] = self.tokenizer(question)["input_ids"]
            if not ids:
                raise ConfigError("the question is empty, and this model has no chat template that would say more")
            # Some tokenizers end each text, and this one is to go on.
            return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] and len(ids) > 1 else ids
        text = render_chat(self.tokenizer, _messages(self.system, turns, question))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # as training does it

    def _pad(self) -> int | None:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else next(iter(self._ends), None)


def _generate(
    model: Any, ids: Sequence[int], config: GenerationConfig, stream: _Stream, stopped: Callable[[], bool]
) -> int:
    """Generate into the stream.

    Returns:
        The number of new tokens.
    """
    prompt = torch.tensor([ids], device=place_of(model))
    with generating_by(model, config):
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
            logits_processor=LogitsProcessorList([RefuseNaN()]),
        )
    return tokens.shape[1] - len(ids)


class _Stream:
    """Text of tokens as they come: what transformers calls a streamer.

    Not transformers' own: it waits for the next space, which some languages do not write, and decodes each line by
    itself, whereby some tokenizers drop the space that a line begins with. Here each piece is what a token adds to the
    text of the piece before it, and unfinished characters wait.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[int],
        write: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._tokenizer, self._ends, self._write, self._stopped = tokenizer, ends, write, stopped
        self._tokens: list[int] = []
        self._before = self._shown = 0
        self._in_prompt = True
        self.last: int | None = None
        self.text = ""

    def put(self, tokens: Tensor) -> None:
        """Take new tokens; the first that come are the prompt."""
        if self._in_prompt:
            self._in_prompt = False
            return
        for token in tokens.reshape(-1).tolist():
            self.last = token
            # generate may be a token ahead of the wish to stop
            if token not in self._ends and not self._stopped():
                self._tokens.append(token)
        text = self._new_text()
        if not text.endswith(_UNFINISHED):
            self._show(text)

    def end(self) -> None:
        """Show what has waited."""
        self._show(self._new_text())

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._before : self._shown])
        return self._decode(self._tokens[self._before :])[len(known) :]

    def _show(self, text: str) -> None:
        if text:
            self._before, self._shown = self._shown, len(self._tokens)
            self.text += text
            self._write(text)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Stop(StoppingCriteria):
    """Ends an answer when somebody wants it."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stopped(), dtype=torch.bool, device=input_ids.device)


def _messages(system: str | None, turns: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]
