"""The client against a mock server that behaves, fails, lies, stalls and vanishes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from llmtool.bench.client import ClientOptions, HttpBackend, base_url, served_models
from llmtool.bench.config import BenchConfig
from llmtool.bench.mock import MockOptions, MockServer
from llmtool.bench.run import connect
from llmtool.errors import LLMToolError, UsageError
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest

T = TypeVar("T")
PROMPT = BenchRequest(token_ids=(1, 2, 3, 4, 5), prompt_len=5, max_tokens=6)
CHAT = BenchRequest(messages=({"role": "user", "content": "say it"},), max_tokens=6)


def against(mock: MockOptions, use: Callable[[MockServer, HttpBackend], Awaitable[T]], **options: Any) -> T:
    async def main() -> T:
        async with (
            MockServer(mock) as server,
            HttpBackend(ClientOptions(url=server.url, model="mock", **options)) as backend,
        ):
            return await use(server, backend)

    return asyncio.run(main())


def one(mock: MockOptions, request: BenchRequest = PROMPT, **options: Any) -> RequestRecord:
    async def use(server: MockServer, backend: HttpBackend) -> RequestRecord:
        record = RequestRecord()
        await backend.generate(request, record)
        return record

    return against(mock, use, **options)


@pytest.mark.parametrize("request_", [PROMPT, CHAT], ids=["completions", "chat"])
def test_a_good_stream_is_timed_and_counted(request_: BenchRequest) -> None:
    before = time.perf_counter()
    record = one(MockOptions(ttft=0.05, itl=0.02, cached_share=0.5), request_, keep_text=True)
    assert record.success, record.error
    assert (record.output_tokens, record.counted, record.finish_reason) == (6, True, "length")
    assert record.prompt_tokens == (5 if request_ is PROMPT else 2)
    assert record.cached_tokens == record.prompt_tokens // 2
    assert len(record.itls) == 5
    assert record.text == "tok " * 6
    assert record.start >= before
    # The mock never sends early, so these bounds hold on any machine.
    assert record.ttft >= 0.05
    assert record.e2e >= 0.05 + 5 * 0.02
    assert record.ttft + sum(record.itls) <= record.e2e + 1e-9
    assert record.tpot is not None


def test_speculation_like_chunks_count_tokens_by_usage() -> None:
    record = one(MockOptions(tokens_per_chunk=4))
    assert (record.output_tokens, len(record.itls)) == (6, 1)


def test_without_usage_chunks_are_counted_and_the_prompt_is_as_known() -> None:
    record = one(MockOptions(fault="no_usage"))
    assert record.success
    assert (record.counted, record.output_tokens, record.prompt_tokens) == (False, 6, 5)


def test_a_missing_done_is_forgiven_only_with_a_finish_reason() -> None:
    record = one(MockOptions(fault="no_done"))
    assert not record.success
    assert "without a finish reason" in record.error


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("status", "HTTP 503: the mock was told to fail"),
        ("garbage", "an event that is not JSON"),
        ("drop", "Client"),
        ("error_event", "the engine died"),
        ("not_sse", "no event stream but application/json"),
        ("empty", "without a finish reason"),
    ],
)
@pytest.mark.parametrize("request_", [PROMPT, CHAT], ids=["completions", "chat"])
def test_faults_are_recorded_not_raised(fault: str, message: str, request_: BenchRequest) -> None:
    record = one(MockOptions(fault=fault), request_)
    assert not record.success
    assert message in record.error
    assert record.e2e > 0


def test_a_server_that_stalls_times_out_and_is_released() -> None:
    async def use(server: MockServer, backend: HttpBackend) -> tuple[RequestRecord, int]:
        record = RequestRecord()
        await backend.generate(PROMPT, record)
        for _ in range(100):
            if server.aborted:
                break
            await asyncio.sleep(0.01)
        return record, server.aborted

    record, aborted = against(MockOptions(fault="hang"), use, timeout=0.3)
    assert "timed out" in record.error
    assert record.ttft > 0  # two chunks did come
    assert aborted == 1


def test_nobody_listens() -> None:
    async def main() -> RequestRecord:
        record = RequestRecord()
        async with HttpBackend(ClientOptions(url="http://127.0.0.1:9", model="m")) as backend:
            await backend.generate(PROMPT, record)
            assert await backend.counters() == {}
        return record

    record = asyncio.run(main())
    assert "ClientConnector" in record.error


EVENTS = b'data: {"choices":[{"index":0,"text":"a","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(EVENTS) + EVENTS
)


@pytest.mark.parametrize("answers", [1, 0], ids=["closes kept connections", "answers nobody"])
def test_a_kept_connection_that_the_server_closed_is_no_fault_of_the_request(answers: int) -> None:
    """A server that answers so many requests of a connection and closes it at the next without a word."""

    async def main() -> tuple[list[RequestRecord], int]:
        asked = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            for i in range(answers + 1):
                head = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
                lengths = [int(h[15:]) for h in head if h.startswith(b"content-length")]
                await reader.readexactly(lengths[0])
                asked += 1
                if i < answers:
                    writer.write(ANSWER)
                    await writer.drain()
                if b"connection: close" in head:
                    break
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with HttpBackend(ClientOptions(url=f"http://127.0.0.1:{port}", model="m")) as backend:
                records = [RequestRecord(), RequestRecord()]
                for record in records:
                    await backend.generate(PROMPT, record)
        return records, asked

    records, asked = asyncio.run(main())
    if answers:
        assert [r.error for r in records] == ["", ""]
        assert asked == 3  # the second was asked twice
    else:
        assert all("ServerDisconnected" in r.error for r in records)
        assert asked == 2  # a new connection that breaks is not tried again


def test_cancelling_aborts_the_request_at_the_server() -> None:
    async def use(server: MockServer, backend: HttpBackend) -> int:
        task = asyncio.create_task(backend.generate(PROMPT, RequestRecord()))
        while not server.count:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(200):
            if server.aborted:
                break
            await asyncio.sleep(0.01)
        return server.aborted

    assert against(MockOptions(ttft=30.0), use) == 1


def test_bodies_carry_prompt_length_fields_and_extras() -> None:
    async def use(server: MockServer, backend: HttpBackend) -> list[dict[str, Any]]:
        for request in (
            PROMPT,
            CHAT,
            BenchRequest(text="hi", max_tokens=2, extra={"priority": 3, "temperature": 1.0}),
            BenchRequest(text="hi"),
        ):
            await backend.generate(request, RequestRecord())
        return list(server.requests)

    fields = {"temperature": 0.0, "ignore_eos": True}
    ids, chat, text, open_ended = against(MockOptions(itl=0.0), use, fields=fields)
    assert ids["prompt"] == [1, 2, 3, 4, 5]
    assert (ids["max_tokens"], ids["stream"], ids["model"]) == (6, True, "mock")
    assert ids["stream_options"] == {"include_usage": True}
    assert (ids["temperature"], ids["ignore_eos"]) == (0.0, True)
    assert chat["messages"] == [{"role": "user", "content": "say it"}]
    assert "prompt" not in chat
    assert (text["priority"], text["temperature"]) == (3, 1.0)
    assert "max_tokens" not in open_ended


def test_api_key() -> None:
    assert "HTTP 401: wrong API key" in one(MockOptions(api_key="secret")).error
    assert one(MockOptions(api_key="secret"), api_key="secret").success


def test_api_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_API_KEY", "secret")
    assert one(MockOptions(api_key="secret")).success


def test_counters_are_read_from_the_server() -> None:
    async def use(server: MockServer, backend: HttpBackend) -> dict[str, float]:
        await backend.generate(PROMPT, RequestRecord())
        return await backend.counters()

    assert against(MockOptions(), use) == {"generation_tokens": 6.0}


def test_urls() -> None:
    assert base_url("http://h:1/v1/") == base_url("http://h:1") == "http://h:1"
    assert base_url("https://h/proxy/v1") == "https://h/proxy"
    with pytest.raises(UsageError, match="http://"):
        base_url("localhost:8000")


def test_connect_finds_or_checks_the_model() -> None:
    async def main() -> None:
        async with MockServer(MockOptions(model="m1")) as server:
            config, backend = await connect(BenchConfig(url=server.url + "/v1"))
            await backend.close()
            assert config.model == "m1"
            with pytest.raises(UsageError, match="does not serve 'm2'"):
                await connect(BenchConfig(url=server.url, model="m2"))
            with pytest.raises(LLMToolError, match="HTTP 404"):
                await served_models(server.url + "/nowhere")
        with pytest.raises(LLMToolError, match="No server answers"):
            await connect(BenchConfig(url=server.url))
        with pytest.raises(UsageError, match="no server"):
            await connect(BenchConfig())

    asyncio.run(main())
