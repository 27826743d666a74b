"""The in-process backend against a scripted engine with the methods of AsyncEngine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from llmtool.bench.config import BenchConfig, DatasetConfig
from llmtool.bench.inprocess import EngineBackend, EngineOptions, sampling_params
from llmtool.bench.run import run_bench
from llmtool.core.request import FinishReason, SamplingParams, SequenceOutput
from llmtool.core.stats import EngineStats
from llmtool.errors import EngineDead, RequestTooLong, UsageError
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest, ChatMessage
from tests.workload.fake import ByteTokenizer

PROMPT = BenchRequest(token_ids=(1, 2, 3), prompt_len=3, max_tokens=4)


class Stream:
    def __init__(self, engine: Engine, outputs: list[SequenceOutput | Exception]) -> None:
        self._engine, self._outputs = engine, outputs

    async def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        for output in self._outputs:
            await asyncio.sleep(self._engine.gap)
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason is not None:
                self._engine.open -= 1

    def abort(self) -> None:
        self._engine.aborts += 1


class Engine:
    """Answers each request with its max_tokens tokens, two in the second step."""

    def __init__(self, gap: float = 0.001, script: list[SequenceOutput | Exception] | None = None) -> None:
        self.gap, self.script = gap, script
        self.calls: list[tuple[str, list[int], SamplingParams, int, str]] = []
        self.aborts = self.open = 0
        self.refuse: Exception | None = None
        self.stats = EngineStats(pages_peak=3, rss_bytes=1000)
        self.info = SimpleNamespace(weight_bytes=100, num_pages=10, page_bytes=512, aot_bytes=0)

    async def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Stream:
        if self.refuse:
            raise self.refuse
        self.calls.append((request_id, list(prompt_token_ids), params, priority, cache_salt))
        self.open += 1
        self.stats.prompt_tokens += len(prompt_token_ids)
        if self.script is not None:
            return Stream(self, self.script)
        total = params.max_tokens or 1
        steps = (
            [[65]] + ([[66, 67]] if total >= 3 else []) + [[68]] * (total - 3 if total >= 3 else total - 1)
        )
        outputs: list[SequenceOutput | Exception] = [
            SequenceOutput(request_id, 0, step, num_prompt_tokens=3, num_cached_tokens=2) for step in steps
        ]
        assert isinstance(outputs[-1], SequenceOutput)
        outputs[-1].finish_reason = FinishReason.LENGTH
        return Stream(self, outputs)


class Chat(ByteTokenizer):
    def encode_prompt(self, text: str) -> Sequence[int]:
        return [1, *text.encode()]

    def encode_chat(self, messages: Sequence[ChatMessage]) -> Sequence[int]:
        return [2, *(str(messages[0]["content"])).encode()]


def one(engine: Engine, request: BenchRequest = PROMPT, **options: Any) -> RequestRecord:
    record = RequestRecord()
    asyncio.run(EngineBackend(engine, Chat(), EngineOptions(**options)).generate(request, record))
    return record


def test_a_request_is_timed_and_counted() -> None:
    record = one(Engine(), keep_text=True)
    assert record.success, record.error
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (3, 4, 2)
    assert len(record.itls) == 2  # three steps brought tokens, one of them two
    assert record.ttft >= 0.001
    assert record.e2e == pytest.approx(record.ttft + sum(record.itls))
    assert (record.text, record.finish_reason, record.counted) == ("ABCD", "length", True)


def test_fields_reach_the_engine() -> None:
    engine = Engine()
    request = BenchRequest(text="hi", max_tokens=2, extra={"priority": 4, "cache_salt": "s", "top_k": 9})
    one(engine, request, fields={"temperature": 0.0, "ignore_eos": True})
    _, prompt, params, priority, salt = engine.calls[0]
    assert prompt == [1, *b"hi"]
    assert (params.max_tokens, params.temperature, params.ignore_eos, params.top_k) == (2, 0.0, True, 9)
    assert (priority, salt) == (4, "s")
    one(engine, BenchRequest(messages=({"role": "user", "content": "yo"},), max_tokens=1))
    assert engine.calls[1][1] == [2, *b"yo"]


def test_refusals_and_failures_are_recorded() -> None:
    engine = Engine()
    engine.refuse = RequestTooLong("The prompt has 9 tokens.")
    assert one(engine).error == "The prompt has 9 tokens."
    assert "mid-stream" in one(Engine(script=[SequenceOutput("x", 0, [1]), EngineDead("mid-stream")])).error
    failed = SequenceOutput("x", 0, [], finish_reason=FinishReason.ERROR, error="NaN logits")
    record = one(Engine(script=[SequenceOutput("x", 0, [1]), failed]))
    assert (record.success, record.error) == (False, "NaN logits")
    assert "without a finish reason" in one(Engine(script=[SequenceOutput("x", 0, [1])])).error
    assert "no request field 'best_of'" in one(Engine(), fields={"best_of": 2}).error


def test_a_bug_in_the_engine_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        one(Engine(script=[ZeroDivisionError()]))


def test_an_answer_without_a_token() -> None:
    record = one(Engine(script=[SequenceOutput("x", 0, [], finish_reason=FinishReason.STOP)]))
    assert record.success
    assert record.ttft == record.e2e > 0


def test_cancelling_aborts() -> None:
    engine = Engine(gap=30.0)

    async def main() -> None:
        task = asyncio.create_task(EngineBackend(engine, None).generate(PROMPT, RequestRecord()))
        while not engine.calls:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert engine.aborts == 1


def test_a_whole_run_in_process() -> None:
    engine = Engine()
    config = BenchConfig(
        model="scripted", dataset=DatasetConfig(num_prompts=10, random_input_len=6, random_output_len=4)
    )
    backend = EngineBackend(
        engine, None, EngineOptions(fields=config.body_fields(), description="in process")
    )
    result = asyncio.run(run_bench(config, backend, ByteTokenizer()))
    m = result.runs[0].metrics
    assert (m["completed"], m["total_output_tokens"], m["cached_tokens"]) == (10, 40, 20)
    assert len({call[0] for call in engine.calls}) == 11  # ids are unique, the warm-up's too
    assert result.runs[0].server["server_counters"]["prompt_tokens"] == 60
    memory = {"weights": 100, "kv_cache": 5120, "kv_peak": 1536, "rss": 1000}
    assert result.runs[0].server["memory_bytes"] == memory
    assert engine.open == 0


def test_text_without_a_tokenizer_is_one_clear_error() -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        asyncio.run(EngineBackend(Engine(), None).generate(BenchRequest(text="x"), RequestRecord()))


def test_sampling_params_take_lists_of_stop_tokens() -> None:
    assert sampling_params({"stop_token_ids": [3, 4]}).stop_token_ids == (3, 4)
    with pytest.raises(UsageError, match="no request field 'nonsense'"):
        sampling_params({"nonsense": 1})
