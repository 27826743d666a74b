"""A scripted engine with AsyncEngine's shape, and a tiny tokenizer made on the spot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmtool.core.request import (
    FinishReason,
    RequestTimes,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)
from llmtool.core.stats import EngineStats, FleetView, GroupView, MemoryView
from llmtool.errors import EngineDead, LLMToolError, QueueFull
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.parts import PoolingInfo

CHATML = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}
{%- for call in message.get('tool_calls') or [] -%}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLAIN_CHATML = (
    CHATML.partition("{% endif %}")[2].removeprefix("\n").replace("{%- for message", "{% for message", 1)
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} <tool_call> </tool_call>',
    "one two three four five six seven eight nine ten END STOP",
]


@cache
def tiny_tokenizer(template: str = CHATML) -> Tokenizer:
    """Byte-level BPE of about 320 tokens; <|im_end|> ends a sequence."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend, {"eos_token": "<|im_end|>"}, {"default": template})


@dataclass
class Info:
    model: str = "org/tiny"
    served_model_name: str = "tiny"
    max_model_len: int = 512
    vocab_size: int = 320
    max_num_seqs: int = 64
    max_waiting: int = 1024
    num_pages: int = 100
    page_bytes: int = 1024
    aot_bytes: int = 0
    weight_bytes: int = 5000
    eos_token_ids: tuple[int, ...] = (2,)
    pooling: PoolingInfo | None = None


@dataclass
class Added:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str


@dataclass
class Pooled:
    request_id: str
    inputs: list[list[int]]
    segments: tuple[int, ...]
    priority: int


Script = Callable[[list[int], SamplingParams, int], list[int]]
"""(prompt, params, answer) -> the tokens the engine "samples"."""


@dataclass
class FakeEngine:
    """Answers with `script`'s tokens, `per_step` of them every `delay` seconds, cut at max_tokens and at EOS."""

    script: Script
    info: Info = field(default_factory=Info)
    stats: EngineStats = field(default_factory=EngineStats)
    dead: LLMToolError | None = None
    fleet: FleetView | None = None
    on_step: Callable[[int], None] | None = None
    delay: float = 0.0
    per_step: int = 1
    max_requests: int = 10_000
    fail_at: int | None = None  # this many tokens, then SequenceOutput.error
    added: list[Added] = field(default_factory=list)
    pooled: list[Pooled] = field(default_factory=list)
    aborted: list[tuple[str, int | None]] = field(default_factory=list)
    running: dict[str, FakeStream] = field(default_factory=dict)
    draining: bool = False

    def __post_init__(self) -> None:
        self._died = asyncio.Event()

    async def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> FakeStream:
        if self.dead is not None:
            raise self.dead
        if self.draining:
            raise QueueFull("The server is shutting down.")
        if len(self.running) >= self.max_requests:
            raise QueueFull("The queue is full.", retry_after=3.0)
        assert request_id not in self.running
        prompt = list(prompt_token_ids)
        self.added.append(Added(request_id, prompt, params, priority, cache_salt))
        stream = FakeStream(self, request_id, prompt, params)
        self.running[request_id] = stream
        await asyncio.sleep(0)
        return stream

    async def pool(
        self,
        request_id: str,
        inputs: Sequence[Sequence[int]],
        *,
        segments: Sequence[int] = (),
        priority: int = 0,
    ) -> PoolStream:
        if len(self.running) >= self.max_requests:
            raise QueueFull("The queue is full.", retry_after=3.0)
        self.pooled.append(Pooled(request_id, [list(ids) for ids in inputs], tuple(segments), priority))
        await asyncio.sleep(0)
        return PoolStream(self, request_id, self.pooled[-1])

    def die(self) -> None:
        self.dead = EngineDead("The engine process ended unexpectedly (exit code -9).")
        for stream in list(self.running.values()):
            stream.queue.put_nowait(self.dead)
        self.running.clear()
        self._died.set()

    async def memory(self) -> MemoryView:
        if self.dead is not None:
            raise self.dead
        parts = {"tokens": 300, "tail": 20, "cached": 80, "padding": 0, "free": 624}
        return MemoryView(1024, parts, (GroupView("full", 2, 16, 1024, 64),))

    async def wait_dead(self) -> LLMToolError:
        await self._died.wait()
        assert self.dead is not None
        return self.dead

    async def drain(self, timeout: float) -> bool:
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                while self.running:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            for stream in list(self.running.values()):
                stream.abort()
            return False
        return True

    async def close(self) -> None:
        pass


def fake_vector(token_ids: Sequence[int], size: int) -> np.ndarray:
    """What the fake engine makes of a sequence: numbers that are all different."""
    return np.array([len(token_ids) + (sum(token_ids) + 3 * i) % 7 for i in range(size)], np.float32)


class PoolStream:
    """Vectors in reverse order, as an engine that sorts by length may deliver them. fail_at: input that fails."""

    def __init__(self, engine: FakeEngine, request_id: str, pooled: Pooled) -> None:
        self.engine, self.request_id, self.pooled = engine, request_id, pooled
        self.left = list(range(len(pooled.inputs)))

    def __aiter__(self) -> PoolStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        await asyncio.sleep(self.engine.delay)
        if not self.left:
            raise StopAsyncIteration
        index = self.left.pop()
        out = SequenceOutput(self.request_id, index, (), finish_reason=FinishReason.STOP)
        out.times = RequestTimes(0.0, 0.25, 0.5, 0.5)
        assert self.engine.info.pooling is not None
        if index == self.engine.fail_at:
            out.finish_reason, out.error = FinishReason.ERROR, "This input is cursed."
        else:
            out.vector = fake_vector(self.pooled.inputs[index], self.engine.info.pooling.size).tobytes()
        return out

    def abort(self, index: int | None = None) -> None:
        if self.left:
            self.engine.aborted.append((self.request_id, index))
            self.left.clear()


class FakeStream:
    def __init__(
        self, engine: FakeEngine, request_id: str, prompt: list[int], params: SamplingParams
    ) -> None:
        self.engine, self.request_id, self.prompt, self.params = engine, request_id, prompt, params
        self.queue: asyncio.Queue[SequenceOutput | Exception] = asyncio.Queue()
        self.open = set(range(params.n))
        self.tasks = [asyncio.create_task(self._answer(i)) for i in range(params.n)]

    async def _answer(self, index: int) -> None:
        engine, params = self.engine, self.params
        tokens = engine.script(self.prompt, params, index)
        limit = (
            engine.info.max_model_len - len(self.prompt) if params.max_tokens is None else params.max_tokens
        )
        tokens = tokens[:limit]
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(engine.info.eos_token_ids))
        at = 0
        while at < len(tokens):
            await asyncio.sleep(engine.delay)
            if index not in self.open or engine.dead is not None:
                return
            step = tokens[at : at + engine.per_step]
            stop = next(
                (i for i, t in enumerate(step) if t in ends and at + i + 1 >= params.min_tokens), None
            )
            step = step if stop is None else step[: stop + 1]
            out = SequenceOutput(self.request_id, index, step)
            if params.logprobs is not None:
                out.logprobs = [self.logprob(t, index) for t in step]
            if at == 0:
                out.num_prompt_tokens, out.num_cached_tokens = len(self.prompt), 4
                if params.prompt_logprobs is not None and index == 0:
                    out.prompt_logprobs = [None, *(self.logprob(t, 0) for t in self.prompt[1:])]
            at += len(step)
            if engine.on_step is not None:
                engine.on_step(len(step))
            if engine.fail_at is not None and at >= engine.fail_at:
                out.finish_reason, out.error = FinishReason.ERROR, "The logits are not finite."
            elif stop is not None:
                out.finish_reason, out.stop_token = FinishReason.STOP, step[-1]
            elif at >= len(tokens):
                out.finish_reason = FinishReason.LENGTH
            self._put(out)
            if out.finish_reason is not None:
                return

    def logprob(self, token: int, index: int) -> TokenLogprob:
        k = self.params.logprobs or self.params.prompt_logprobs or 0
        value = -0.5 - index
        return TokenLogprob(token, value, 1, tuple((token + i, value - i) for i in range(k)))

    def _put(self, out: SequenceOutput) -> None:
        if out.finish_reason is not None:
            out.times = RequestTimes(0.0, 0.25, 0.5, 1.5)
            self.open.discard(out.index)
            if not self.open:
                self.engine.running.pop(self.request_id, None)
        self.queue.put_nowait(out)

    def __aiter__(self) -> FakeStream:
        self.left = self.params.n
        return self

    async def __anext__(self) -> SequenceOutput:
        if self.left == 0:
            raise StopAsyncIteration
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        if item.finish_reason is not None:
            self.left -= 1
        return item

    def abort(self, index: int | None = None) -> None:
        self.engine.aborted.append((self.request_id, index))
        for i in sorted(self.open if index is None else self.open & {index}):
            self._put(SequenceOutput(self.request_id, i, [], finish_reason=FinishReason.ABORT))
