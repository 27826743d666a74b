"""One benchmark request, and what prompts are made of: a tokenizer seen as a tiny protocol, and real English.

A prompt is text, token ids or chat messages. Token ids make the input length exact; text needs no tokenizer.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from llmtool.errors import UsageError

ChatMessage = Mapping[str, Any]  # {"role": ..., "content": ...}, as the OpenAI protocol has it


class Tokenizer(Protocol):
    """The part of a tokenizer that workloads need. `encode` adds no special tokens."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to ask, how much to generate, and when.

    Exactly one of text, token_ids, messages is set. max_tokens: output tokens asked for (None: server's
    choice). arrival: seconds after the first request of a timed trace, or None. prompt_len: input tokens,
    where known. extra: fields added to the request body.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int | None = None
    arrival: float | None = None
    prompt_len: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.text is None) + (self.token_ids is None) + (self.messages is None) == 2
        assert self.max_tokens is None or self.max_tokens >= 1

    def as_chat(self, tokenizer: Tokenizer | None) -> BenchRequest:
        """The same request as one user message, for the chat endpoint; the template makes its length
        unknown.
        """
        if self.messages is not None:
            return self
        request = self.as_text(tokenizer)
        return replace(
            request, text=None, messages=({"role": "user", "content": request.text},), prompt_len=None
        )

    def as_text(self, tokenizer: Tokenizer | None) -> BenchRequest:
        """Token ids decoded; text stays. Decoded ids need not encode to the same ids, so the length is
        unknown.
        """
        if self.token_ids is None:
            return self
        text = need(tokenizer, "to turn token ids into text").decode(self.token_ids)
        return replace(self, token_ids=None, text=text, prompt_len=None)


def need(tokenizer: Tokenizer | None, purpose: str) -> Tokenizer:
    if tokenizer is None:
        raise UsageError(
            f"A tokenizer is needed {purpose}.",
            "Give one with --tokenizer DIR, or bench a server that has /tokenize.",
        )
    return tokenizer


class TokenSource:
    """Prompt tokens of any length: random ids, or passages of the English that ships with Python (~700
    kB).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._english: list[int] = []
        # Special tokens would end or reshape a prompt in some chat models, so random ids avoid them.
        special = {int(i) for i in getattr(tokenizer, "all_special_ids", ())}
        allowed = np.ones(tokenizer.vocab_size, dtype=bool)
        allowed[[i for i in special if i < tokenizer.vocab_size]] = False
        self._allowed = np.flatnonzero(allowed)  # [vocab - special]
        if not len(self._allowed):
            raise UsageError("The tokenizer has no ordinary tokens.", "Check --tokenizer.")

    @property
    def english(self) -> list[int]:
        if not self._english:
            topics = pydoc_data.topics.topics
            self._english = list(self._tokenizer.encode("\n\n".join(topics[k] for k in sorted(topics))))
        return self._english

    def random(self, n: int, rng: np.random.Generator) -> list[int]:
        """`n` ids, uniform over the vocabulary without its special tokens."""
        ids: list[int] = self._allowed[rng.integers(0, len(self._allowed), size=n)].tolist()
        return ids

    def passage(self, n: int, rng: np.random.Generator) -> list[int]:
        """`n` consecutive ids of the English text from a random place; the text wraps round if `n` is
        longer.
        """
        text = self.english
        start = int(rng.integers(0, len(text)))
        out = text[start : start + n]
        while len(out) < n:
            out += text[: n - len(out)]
        return out

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))
