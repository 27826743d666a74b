"""Benching an encoder: over HTTP against our own server with a fake engine, and in process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig
from llmtool.bench.inprocess import EngineBackend, EngineOptions
from llmtool.bench.run import connect, run_bench
from llmtool.config import ServerConfig
from llmtool.errors import LLMToolError, UsageError
from llmtool.runtime.parts import PoolingInfo
from llmtool.serve.server import bind, serve
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest
from tests.serve.fake import FakeEngine, Info, tiny_tokenizer
from tests.workload.fake import ByteTokenizer

T = TypeVar("T")
CONFIG = BenchConfig(
    endpoint="embeddings",
    dataset=DatasetConfig(num_prompts=6, random_input_len=9),
    load=LoadConfig(num_warmups=1),
)


EMBED = PoolingInfo("embed", 4)


def encoder(pooling: PoolingInfo | None = EMBED, **settings: Any) -> FakeEngine:
    return FakeEngine(lambda prompt, params, index: [], Info(pooling=pooling), **settings)


def served(make: Callable[[], FakeEngine], use: Callable[[str, FakeEngine], Awaitable[T]]) -> T:
    async def main() -> T:
        listener, stop, engine = bind("127.0.0.1", 0), asyncio.Event(), make()
        ready = asyncio.Event()
        server = asyncio.create_task(
            serve(
                engine,
                tiny_tokenizer(),
                ServerConfig(),
                listener,
                on_listening=lambda host, port: ready.set(),
                handle_signals=False,
                stop=stop,
            )
        )
        await ready.wait()
        try:
            return await use(f"http://127.0.0.1:{listener.getsockname()[1]}", engine)
        finally:
            stop.set()
            await server

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_over_http() -> None:
    async def use(url: str, engine: FakeEngine) -> dict[str, Any]:
        config, backend = await connect(replace(CONFIG, url=url))
        async with backend:
            result = await run_bench(config, backend, ByteTokenizer())
        assert [len(pooled.inputs) for pooled in engine.pooled] == [1] * 7
        return dict(result.runs[0].metrics)

    metrics = served(lambda: encoder(delay=0.01), use)
    assert metrics["completed"] == 6 and metrics["failed"] == 0
    assert metrics["total_input_tokens"] == 54 and metrics["total_output_tokens"] == 0
    assert metrics["mean_e2el_ms"] >= 10 and metrics["request_throughput"] > 0
    assert metrics["mean_tpot_ms"] is None and metrics["total_token_throughput"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encoder(None), "HTTP 400: .* generates text"),
        (lambda: encoder(fail_at=0), "HTTP 502: .*cursed"),
        (lambda: encoder(PoolingInfo("classify", 2, labels=("a", "b"))), "HTTP 400: .*classifier"),
    ],
)
def test_what_fails_says_why(make: Callable[[], FakeEngine], message: str) -> None:
    async def use(url: str, engine: FakeEngine) -> None:
        config, backend = await connect(replace(CONFIG, url=url))
        async with backend:
            with pytest.raises(LLMToolError, match=message):
                await run_bench(config, backend, ByteTokenizer())

    served(make, use)


def test_in_process() -> None:
    async def main() -> RequestRecord:
        record = RequestRecord()
        engine = encoder(delay=0.01)
        backend = EngineBackend(engine, None, EngineOptions(embeddings=True))  # type: ignore[arg-type]
        await backend.generate(BenchRequest(token_ids=(5, 6, 7)), record)
        assert [pooled.inputs for pooled in engine.pooled] == [[[5, 6, 7]]]
        return record

    record = asyncio.run(main())
    assert record.success and record.finish_reason == "stop"
    assert (record.prompt_tokens, record.output_tokens) == (3, 0) and record.e2e >= 0.01


def test_what_means_nothing_is_refused() -> None:
    for field in ({"top_p": 0.5}, {"top_k": 3}, {"ignore_eos": True}, {"save_text": True}):
        with pytest.raises(UsageError, match="not sampled"):
            BenchConfig(endpoint="embeddings", **field)  # type: ignore[arg-type]
    assert CONFIG.body_fields() == {"encoding_format": "base64"}
