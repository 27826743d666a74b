"""The engine's work for one HTTP request, as text: one engine request per prompt, their answers numbered through.

`Generation` turns token outputs into `Delta`s (text, logprobs, why it ended) and ends an answer in the engine when
a stop string appears. `collect` gathers them into whole `Answer`s; completions and chat only format what comes out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from llmtool.core.request import FinishReason, SamplingParams, SequenceOutput, TokenLogprob
from llmtool.errors import LLMToolError, RequestError
from llmtool.models.detokenizer import Detokenizer
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.errors import ServerDraining
from llmtool.serve.metrics import RequestObserver, ServerMetrics
from llmtool.serve.ports import Engine, EngineInfo, RequestStream
from llmtool.serve.text import AnswerText

MAX_SEQUENCES = 4096  # prompts x answers of one HTTP request


class GenerationFailed(LLMToolError):
    """The engine gave up on one sequence and said why."""

    http_status = 502
    kind = "generation_error"


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. min_tokens: stop strings are not looked for before."""

    stop: Sequence[str] = ()
    include_stop: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True


@dataclass(slots=True)
class Delta:
    """What is new of one answer. index: prompt * n + answer. The last one carries `finish_reason`."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Answer:
    """A whole answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class TokenUsage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """Created by `start`, iterated once, aborted at any moment (idempotent; also what cleaning up does)."""

    def __init__(
        self,
        streams: Sequence[RequestStream],
        observers: Sequence[RequestObserver],
        prompts: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
        params: SamplingParams,
        options: TextOptions,
    ) -> None:
        self._streams = streams
        self._observers = observers
        self._n = params.n
        self._options = options
        self._texts: dict[int, AnswerText] = {}  # by index, unfinished answers
        self._cached = [0] * len(streams)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self.usage = TokenUsage(prompt_tokens=sum(map(len, prompts)))
        self.prompt_logprobs: list[Sequence[TokenLogprob | None]] = [()] * len(
            streams
        )  # by prompt, once known
        for index in range(len(streams) * self._n):
            self._texts[index] = AnswerText(
                Detokenizer(tokenizer, options.skip_special_tokens, prompts[index // self._n]),
                options.stop,
                include_stop=options.include_stop,
                min_tokens=options.min_tokens,
            )

    @classmethod
    async def start(
        cls,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        options: TextOptions,
        arrival: float,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Generation:
        """Admit every prompt or none. arrival: of the HTTP request, by time.monotonic().

        Raises what `Engine.add` raises, and RequestError for more answers than it could ever take.
        """
        total = len(prompts) * params.n
        if total > MAX_SEQUENCES:
            raise RequestError(
                f"{total} answers in one request are too many: the limit is {MAX_SEQUENCES}.", param="n"
            )
        _check_room(total, engine.info)
        streams: dict[int, RequestStream] = {}

        async def admit(number: int, prompt: Sequence[int]) -> None:
            name = request_id if len(prompts) == 1 else f"{request_id}-{number}"
            streams[number] = await engine.add(name, prompt, params, priority=priority, cache_salt=cache_salt)

        try:
            results = await asyncio.gather(*map(admit, range(len(prompts)), prompts), return_exceptions=True)
            for error in results:
                if error is not None:
                    raise error
        except BaseException:  # also a cancellation: the client hung up meanwhile
            for stream in streams.values():
                stream.abort()
            raise
        observers = [metrics.observe(len(prompt), params, arrival) for prompt in prompts]
        ordered = [streams[i] for i in range(len(prompts))]
        return cls(ordered, observers, prompts, tokenizer, params, options)

    def abort(self, reason: str = "abort") -> None:
        """End what still runs in the engine. reason: abort | error, for the metrics."""
        if self._texts:
            self._texts.clear()
            for stream, observer in zip(self._streams, self._observers, strict=True):
                stream.abort()
                observer.ended(reason)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Everything that is new, in order per answer. Raises EngineDead, GenerationFailed."""
        try:
            async with aclosing(_merged(self._streams)) as outputs:
                async for prompt, out in outputs:
                    delta = self._delta(prompt, out)
                    if delta is not None:
                        yield delta
                    if not self._texts:
                        break
        except LLMToolError:
            self.abort("error")
            raise
        finally:
            self.abort()

    def _delta(self, prompt: int, out: SequenceOutput) -> Delta | None:
        """`out` as text; None for what comes after an answer's stop string."""
        index = prompt * self._n + out.index
        text = self._texts.get(index)
        if text is None:
            return None
        if out.finish_reason is FinishReason.ERROR:
            raise GenerationFailed(out.error or "The engine could not go on with this answer.")
        if out.finish_reason is FinishReason.ABORT:  # not by us: what we abort, we no longer listen to
            raise ServerDraining("The server stopped before this answer was complete.")
        finished = out.finish_reason is not None
        by_token = out.finish_reason is FinishReason.STOP and out.stop_token is not None
        piece = text.push(out.token_ids, last=finished, hide_last=by_token and not self._options.include_stop)
        count = piece.num_tokens
        delta = Delta(index, piece.text, out.token_ids[:count], out.logprobs[:count])
        if out.index == 0 and out.prompt_logprobs:  # the other answers share its prompt
            self.prompt_logprobs[prompt] = out.prompt_logprobs
        self.usage.completion_tokens += count
        observer = self._observers[prompt]
        observer.tokens(out.index, count)
        if out.index == 0:  # the others fork its pages, which is sharing and no cache hit
            self._cached[prompt] = max(self._cached[prompt], out.num_cached_tokens)
            self.usage.cached_tokens = sum(self._cached)
        if piece.stop is not None:
            delta.finish_reason, delta.stop_reason = FinishReason.STOP.value, piece.stop
            if not finished:
                self._streams[prompt].abort(out.index)
        elif out.finish_reason is not None:
            delta.finish_reason = out.finish_reason.value
            if (
                out.stop_token in self._stop_token_ids
            ):  # the model's own end of sequence is no reason to report
                delta.stop_reason = out.stop_token
        if delta.finish_reason is not None:
            del self._texts[index]
            observer.finished(out.index, delta.finish_reason, out.times)
        return delta


def _check_room(total: int, info: EngineInfo) -> None:
    """Refuse what even an idle engine has no room for: to ask for it again later would never help."""
    room = info.max_num_seqs + info.max_waiting
    if total > room:
        raise RequestError(
            f"{total} answers in one request are too many: this server takes {room} at once "
            f"({info.max_num_seqs} running, {info.max_waiting} waiting).",
            "Send them in several requests.",
            param="n",
        )


async def _merged(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, SequenceOutput], None]:
    """(which stream, output) of all streams as they come. One stream needs no queue and no tasks."""
    if len(streams) == 1:
        async for out in streams[0]:
            yield 0, out
        return
    queue: asyncio.Queue[tuple[int, SequenceOutput] | BaseException | None] = asyncio.Queue(
        maxsize=len(streams)
    )

    async def pump(number: int, stream: RequestStream) -> None:
        try:
            async for out in stream:
                await queue.put((number, out))
            await queue.put(None)
        except Exception as e:  # raised again by whoever reads the queue
            await queue.put(e)

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(generation: Generation, n: int, best_of: int) -> list[Answer]:
    """All answers, whole, in order; of every `best_of` the `n` with the highest cumulative logprob, best first.

    Needs logprobs of the sampled tokens when best_of > n.
    """
    answers: dict[int, Answer] = {}
    async for delta in generation.deltas():
        answer = answers.setdefault(delta.index, Answer(delta.index))
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
    ordered = [answers[index] for index in sorted(answers)]
    if best_of <= n:
        return ordered
    chosen: list[Answer] = []
    for start in range(0, len(ordered), best_of):
        group = sorted(ordered[start : start + best_of], key=_cumulative_logprob, reverse=True)[:n]
        for answer in group:
            answer.index = len(chosen)
            chosen.append(answer)
    return chosen


def _cumulative_logprob(answer: Answer) -> float:
    return sum(entry.logprob for entry in answer.logprobs)
