"""Perplexity of a model over a text, through the engine that serves it: what a setting costs in quality.

The text is read in windows of one length that overlap: each but the first scores only its last `stride` tokens, so
that every token is scored once and with at least window - stride tokens before it (as transformers' guide to
perplexity of fixed-length models has it). Where the model's tokenizer begins a text with BOS, so does every window.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import pydoc_data.topics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtool.bench.inprocess import AsyncEngineLike
from llmtool.core.request import FinishReason, SamplingParams
from llmtool.errors import LLMToolError, UsageError
from llmtool.models.tokenizer import Tokenizer

Nlls = NDArray[np.float64]
Progress = Callable[[str, float | None], None]

IN_FLIGHT = 4  # windows in the engine at once: while one is collected, the next ones run
CHARS_PER_TOKEN = 16  # far more than any text has on average: how much text may hold the tokens wanted


@dataclass(frozen=True, slots=True)
class PerplexityConfig:
    """perplexity_window: tokens that the model sees at once. perplexity_stride: tokens scored per window, None for
    half of it. perplexity_tokens: how many of the text's first tokens are read; 0: all.
    """

    perplexity_window: int = 1024
    perplexity_stride: int | None = None
    perplexity_tokens: int = 32768

    def __post_init__(self) -> None:
        if self.perplexity_window < 2:
            raise UsageError(f"perplexity_window must be at least 2, not {self.perplexity_window}.")
        if not 1 <= self.stride < self.perplexity_window:
            raise UsageError(
                f"perplexity_stride must be between 1 and {self.perplexity_window - 1}, not {self.stride}."
            )
        if self.perplexity_tokens < 0:
            raise UsageError(f"perplexity_tokens must be at least 0, not {self.perplexity_tokens}.")

    @property
    def stride(self) -> int:
        return self.perplexity_window // 2 if self.perplexity_stride is None else self.perplexity_stride


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end) of the text, of which those from `scored` on are scored."""

    start: int
    end: int
    scored: int


def windows(num_tokens: int, window: int, stride: int, bos: bool) -> list[Window]:
    """Windows that score each token once; the very first token only after a BOS. window: with BOS."""
    size = window - bos
    found, end, scored = [], min(size, num_tokens), 0 if bos else 1
    while scored < num_tokens:
        found.append(Window(max(0, end - size), end, scored))
        scored, end = end, min(end + min(stride, size), num_tokens)
    return found


@dataclass(frozen=True, slots=True)
class Text:
    """A text's tokens. num_bytes: of what the scored tokens spell. bos: what every window begins with."""

    name: str
    token_ids: tuple[int, ...]
    num_bytes: int
    bos: tuple[int, ...] = ()


def read_text(path: str | None) -> tuple[str, str]:
    """(name, text) of a UTF-8 file; without one, the topics of Python's own help. Raises UsageError."""
    if path is None:
        topics = pydoc_data.topics.topics
        return "pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics))
    try:
        return path, Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"Cannot read the text {path}: {reason}.") from None


def tokenized(name: str, text: str, tokenizer: Tokenizer, limit: int) -> Text:
    """The first `limit` tokens (0: all) of a text. Raises UsageError for one with nothing to score."""
    encoding = tokenizer.backend.encode(
        text[: limit * CHARS_PER_TOKEN] if limit else text, add_special_tokens=False
    )
    ids = tuple(encoding.ids[:limit] if limit else encoding.ids)
    framed = tokenizer.encode("")
    bos = (framed[0],) if framed and framed[0] == tokenizer.bos_id else ()
    first = 0 if bos else 1
    if len(ids) <= first:
        raise UsageError(f"The text {name} has {len(ids)} tokens: there is nothing to score.")
    begin, end = encoding.offsets[first][0], encoding.offsets[len(ids) - 1][1]
    return Text(name, ids, len(text[begin:end].encode()), bos)


async def measure(
    engine: AsyncEngineLike, text: Text, config: PerplexityConfig, progress: Progress | None = None
) -> Nlls:
    """float64 [scored], the negative log-likelihood (nats) of each scored token, in order.

    Raises LLMToolError when the engine refuses or fails.
    """
    todo = windows(len(text.token_ids), config.perplexity_window, config.stride, bool(text.bos))
    out = np.empty(len(text.token_ids), np.float64)
    pending, done = iter(todo), itertools.count(1)

    async def work() -> None:
        for window in pending:
            out[window.scored : window.end] = await _score(engine, text, window)
            if progress is not None:
                progress(f"Scoring {text.name}", next(done) / len(todo))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(IN_FLIGHT, len(todo))):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        known = [error for error in errors.exceptions if isinstance(error, LLMToolError)]
        if known:
            raise known[0] from None
        raise
    return out[todo[0].scored :]


async def _score(engine: AsyncEngineLike, text: Text, window: Window) -> Nlls:
    prompt = (*text.bos, *text.token_ids[window.start : window.end])
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    stream = await engine.add(f"perplexity-{window.start}-{window.end}", prompt, params)
    nlls: Nlls | None = None
    async for output in stream:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise LLMToolError(output.error or "The engine ended before it had scored the text.")
        if output.prompt_logprobs:
            first = len(text.bos) + window.scored - window.start
            scores = output.prompt_logprobs[first:]
            nlls = -np.fromiter((entry.logprob for entry in scores if entry is not None), np.float64)
    assert nlls is not None and len(nlls) == window.end - window.scored
    return nlls


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What one run measured. facts: of the engine, for the result."""

    text: Text
    nlls: Nlls
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def nll(self) -> float:
        """Nats per token."""
        return float(self.nlls.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))  # of a broken model it has no end

    @property
    def bits_per_byte(self) -> float:
        return float(self.nlls.sum()) / math.log(2) / self.text.num_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.facts,
            "perplexity": self.perplexity,
            "nll_per_token": self.nll,
            "nll_standard_error": _standard_error(self.nlls),
            "bits_per_byte": self.bits_per_byte,
            "tokens": len(self.nlls),
            "bytes": self.text.num_bytes,
            "bos": bool(self.text.bos),
            "seconds": self.seconds,
            "tokens_per_second": len(self.nlls) / self.seconds if self.seconds else None,
        }


async def run(
    engine: AsyncEngineLike, text: Text, config: PerplexityConfig, progress: Progress | None = None
) -> Perplexity:
    started = time.perf_counter()
    nlls = await measure(engine, text, config, progress)
    return Perplexity(text, nlls, time.perf_counter() - started)


def change(baseline: Perplexity, measured: Perplexity) -> dict[str, Any]:
    """From baseline to measured: relative changes in percent. Token by token where both read the same tokens, whose
    paired difference has a much smaller standard error; by bytes alone where they do not."""
    bits = 100 * (measured.bits_per_byte / baseline.bits_per_byte - 1)
    same = (baseline.text.token_ids, baseline.text.bos) == (measured.text.token_ids, measured.text.bos)
    if not same:
        return {"bits_per_byte_percent": bits, "same_tokens": False}
    difference = measured.nlls - baseline.nlls
    return {
        "perplexity_percent": 100 * math.expm1(float(difference.mean())),
        "nll_per_token": float(difference.mean()),
        "nll_standard_error": _standard_error(difference),
        "bits_per_byte_percent": bits,
        "same_tokens": True,
    }


def _standard_error(values: Sequence[float] | Nlls) -> float | None:
    """Of the mean of values that do not depend on each other, which neighbouring tokens do a little."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
