"""An engine in this process as a bench backend: no HTTP, no JSON, the same load and the same metrics.

The engine is duck-typed, so that bench imports no torch: AsyncEngine of llmtool.runtime.async_engine fits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmtool.core.request import FinishReason, SamplingParams, SequenceOutput
from llmtool.core.stats import EngineStats
from llmtool.errors import LLMToolError, UsageError
from llmtool.runtime.parts import Sizes, memory_bytes
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest, ChatMessage


class Stream(Protocol):
    def __aiter__(self) -> AsyncIterator[SequenceOutput]: ...

    def abort(self) -> None:
        """Ends the request; harmless when it has ended already."""
        ...


class AsyncEngineLike(Protocol):
    async def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Stream:
        """The request's stream; raises LLMToolError when it is refused."""
        ...

    async def pool(self, request_id: str, inputs: Sequence[Sequence[int]]) -> Stream:
        """The same of an encoder: one vector per input."""
        ...

    @property
    def stats(self) -> EngineStats: ...
    @property
    def info(self) -> Sizes: ...


class PromptTokenizer(Protocol):
    """Text and chat messages to prompt tokens, as the server would make them (special tokens included)."""

    def encode_prompt(self, text: str) -> Sequence[int]: ...

    def encode_chat(self, messages: Sequence[ChatMessage]) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """fields: sampling parameters of every request, under the names of SamplingParams. keep_text: record
    outputs. embeddings: ask for vectors.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    keep_text: bool = False
    embeddings: bool = False
    description: str = "in-process engine"


class EngineBackend:
    """Drives an engine directly. The engine belongs to the caller: `close` leaves it running."""

    def __init__(
        self, engine: AsyncEngineLike, tokenizer: PromptTokenizer | None, options: EngineOptions | None = None
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._options = options or EngineOptions()
        self._ids = itertools.count()

    @property
    def description(self) -> str:
        return self._options.description

    async def close(self) -> None:
        pass

    async def counters(self) -> dict[str, float]:
        stats = self._engine.stats
        spec = stats.spec
        drafts: dict[str, float] = (
            {}
            if spec is None
            else {
                "spec_decode_num_drafts": spec.drafts,
                "spec_decode_num_draft_tokens": spec.draft_tokens,
                "spec_decode_num_accepted_tokens": spec.accepted_tokens,
            }
        )
        return drafts | {
            "prefix_cache_queries": stats.prefix_queries,
            "prefix_cache_hits": stats.prefix_hits,
            "num_preemptions": stats.preemptions,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generation_tokens,
        }

    async def speculation(self) -> dict[str, Any]:
        """What the controller chose last and what it rests on; {} without one."""
        spec = self._engine.stats.spec
        return {} if spec is None else dict(spec.explain or {})

    async def memory(self) -> dict[str, int]:
        return memory_bytes(self._engine.info, self._engine.stats)

    def prompt(self, request: BenchRequest) -> Sequence[int]:
        if request.token_ids is not None:
            return request.token_ids
        if self._tokenizer is None:
            raise UsageError("A tokenizer is needed to bench text or chat prompts in process.")
        if request.messages is not None:
            return self._tokenizer.encode_chat(request.messages)
        assert request.text is not None
        return self._tokenizer.encode_prompt(request.text)

    async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
        # Tokenizing is outside the measured time, as a client's own work is in the HTTP case.
        prompt = self.prompt(request)
        extra = dict(request.extra)
        salt, priority = str(extra.pop("cache_salt", "")), int(extra.pop("priority", 0))
        fields = {"max_tokens": request.max_tokens} | dict(self._options.fields) | extra
        request_id = f"bench-{next(self._ids)}"
        tokens: list[int] = []
        record.prompt_tokens, record.counted = len(prompt), True
        record.start = last = time.perf_counter()
        stream: Stream | None = None
        try:
            if self._options.embeddings:
                stream = await self._engine.pool(request_id, [prompt])
            else:
                params = sampling_params(fields)
                stream = await self._engine.add(
                    request_id, prompt, params, priority=priority, cache_salt=salt
                )
            async for output in stream:
                last = self._note(output, record, tokens, last, time.perf_counter())
        except LLMToolError as e:
            record.error = str(e)
        finally:
            if stream is not None:  # when cancelled, the engine must not go on generating for nobody
                stream.abort()
        if not record.error and record.finish_reason is None:
            record.error = "the stream ended without a finish reason"
        record.success = not record.error
        record.e2e = (last if record.success else time.perf_counter()) - record.start
        if record.success and not record.output_tokens:
            record.ttft = record.e2e
        if self._options.keep_text and self._tokenizer is not None:
            record.text = self._tokenizer.decode(tokens)

    @staticmethod
    def _note(
        output: SequenceOutput, record: RequestRecord, tokens: list[int], last: float, now: float
    ) -> float:
        """Writes one step's output down; returns the moment of the latest output or finish."""
        if output.token_ids:
            if record.output_tokens:
                record.itls.append(now - last)
            else:
                record.ttft = now - record.start
            record.output_tokens += len(output.token_ids)
            tokens += output.token_ids
            last = now
        if output.num_cached_tokens or record.cached_tokens is None:
            record.cached_tokens = output.num_cached_tokens
        if output.finish_reason is not None:
            record.finish_reason = output.finish_reason.value
            last = now
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                record.error = output.error or f"finished with {output.finish_reason.value}"
        return last


def sampling_params(fields: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams of request fields. UsageError on a name it has not; RequestError on a bad value."""
    known = SamplingParams.__dataclass_fields__.keys()
    unknown = sorted(set(fields) - known)
    if unknown:
        raise UsageError(
            f"In process there is no request field {unknown[0]!r}.", f"Known: {', '.join(known)}."
        )
    values = dict(fields)
    if isinstance(values.get("stop_token_ids"), list):
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
    return SamplingParams(**values)
