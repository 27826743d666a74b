"""A real uvicorn on a real socket: clients that leave, clients that never read, crowds, drain, death."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from llmtool.config import ServerConfig
from llmtool.core.request import SamplingParams
from llmtool.errors import EngineDead, UsageError
from llmtool.serve.server import bind, serve
from llmtool.serve.structured import GrammarChecker
from tests.serve.conftest import parse_events, says
from tests.serve.fake import FakeEngine, tiny_tokenizer

pytestmark = pytest.mark.anyio
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


def forever(prompt: list[int], params: SamplingParams, index: int) -> list[int]:
    return tiny_tokenizer().encode("a") * 1_000_000


class Live:
    def __init__(self, engine: FakeEngine, port: int, http: aiohttp.ClientSession) -> None:
        self.engine, self.port, self.http = engine, port, http
        self.stop = asyncio.Event()
        self.serving: asyncio.Task[None]

    def post(self, path: str, **body: Any) -> Any:
        return self.http.post(path, json=body)

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def live(
    engine: FakeEngine, *, send_timeout: float = 30.0, drain_seconds: float = 5.0
) -> AsyncIterator[Live]:
    """The server in this process; at the end it is stopped, and no request may be left in the engine."""
    listener = bind("127.0.0.1", 0)
    heard: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    port = listener.getsockname()[1]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as http:
        server = Live(engine, port, http)
        server.serving = asyncio.create_task(
            serve(
                engine,
                tiny_tokenizer(),
                ServerConfig(drain_seconds=drain_seconds),
                listener,
                on_listening=lambda host, port: heard.set_result(port),
                handle_signals=False,
                stop=server.stop,
                send_timeout=send_timeout,
            )
        )
        assert await heard == port
        try:
            yield server
        finally:
            await http.close()
            server.stop.set()
            await asyncio.gather(server.serving, return_exceptions=True)
            listener.close()
    assert not engine.running


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_ends_its_request(path: str, stream: bool) -> None:
    engine = FakeEngine(forever, delay=0.002)
    async with live(engine) as server:
        body = {"prompt": "a", "messages": USER, "stream": stream, "max_tokens": 400}
        request = asyncio.create_task(server.http.post(path, json=body))
        await server.until(lambda: bool(engine.running))
        if stream:
            response = await request
            assert (await response.content.readline()).startswith(b"data: ")
            response.close()
        else:
            request.cancel()
        await server.until(lambda: not engine.running)
        assert engine.aborted
        async with server.post(COMPLETIONS, prompt="a", max_tokens=2) as after:
            assert after.status == 200  # and the server serves on


async def test_a_client_that_never_reads_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(forever, per_step=1000, delay=0.02)
    engine.info.max_model_len = 10_000_000
    async with live(engine, send_timeout=0.3) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        body = {
            "prompt": "a",
            "stream": True,
            "max_tokens": 1_000_000,
            "logprobs": 5,
        }  # about 0.3 MB per step
        client.sendall(raw_post(COMPLETIONS, body))
        await server.until(lambda: bool(engine.added))
        async with server.post(COMPLETIONS, prompt="a", max_tokens=2) as other:
            assert other.status == 200  # nobody else waits for it
        await server.until(lambda: not engine.running, 20.0)
        assert engine.aborted
        client.settimeout(10.0)  # a connection that was kept open would make reading to its end fail
        received = await asyncio.to_thread(read_all, client)
        client.close()
    assert b"data: " in received and b"[DONE]" not in received
    # Dropped on our side, not left half-written to a polite close that would wait for the client.
    assert [r.levelname for r in caplog.records if r.levelno >= logging.WARNING] == ["WARNING"]


def read_all(client: socket.socket) -> bytes:
    received = b""
    try:
        while piece := client.recv(1 << 20):
            received += piece
    except ConnectionResetError:
        pass
    return received


def raw_post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


async def test_five_hundred_streams_at_once() -> None:
    def script(prompt: list[int], params: SamplingParams, index: int) -> list[int]:
        return [*prompt, *([5] * 8), 2]

    engine = FakeEngine(script, delay=0.02)
    async with live(engine) as server:

        async def one(number: int) -> str:
            async with server.post(COMPLETIONS, prompt=f"n{number}:", stream=True, max_tokens=50) as response:
                assert response.status == 200
                chunks = parse_events((await response.read()).decode())
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            return "".join(c["choices"][0]["text"] for c in chunks)

        texts = await asyncio.gather(*map(one, range(500)))
    tail = tiny_tokenizer().decode([5] * 8)
    assert texts == [f"n{i}:{tail}" for i in range(500)]


async def test_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    engine = FakeEngine(
        lambda p, params, i: [*tiny_tokenizer().encode("one two three four five"), 2], delay=0.03
    )
    async with live(engine) as server:
        stream = await server.http.post(COMPLETIONS, json={"prompt": "a", "stream": True, "max_tokens": 50})
        whole = asyncio.create_task(server.http.post(CHAT, json={"messages": USER}))
        await server.until(lambda: len(engine.running) == 2)
        server.stop.set()
        await server.until(lambda: engine.draining)
        async with server.http.get("/ready") as ready:
            assert ready.status == 503
        async with server.http.get("/health") as health:
            assert health.status == 200
        async with server.post(COMPLETIONS, prompt="b") as refused:
            assert refused.status == 503 and refused.headers["Retry-After"]
        chunks = parse_events((await stream.read()).decode())
        assert "".join(c["choices"][0]["text"] for c in chunks) == "one two three four five"
        answer = await (await whole).json()
        assert answer["choices"][0]["message"]["content"] == "one two three four five"
        await asyncio.wait_for(server.serving, 10)  # no error: the process would exit with 0
    assert not engine.aborted


async def test_drain_gives_up_after_its_time_and_says_so() -> None:
    engine = FakeEngine(forever, delay=0.01)
    async with live(engine, drain_seconds=0.2) as server:
        stream = await server.http.post(CHAT, json={"messages": USER, "stream": True})
        whole = asyncio.create_task(server.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 500}))
        await server.until(lambda: len(engine.running) == 2)
        server.stop.set()
        events = parse_events((await stream.read()).decode())
        assert "stopped before" in events[-1]["error"]["message"]
        answer = await whole
        assert answer.status == 503 and "stopped before" in (await answer.json())["error"]["message"]
        await asyncio.wait_for(server.serving, 10)


async def test_the_death_of_the_engine_is_told_to_everyone() -> None:
    engine = FakeEngine(forever, delay=0.005)
    async with live(engine) as server:
        stream = await server.http.post(COMPLETIONS, json={"prompt": "a", "stream": True, "max_tokens": 400})
        whole = asyncio.create_task(server.http.post(CHAT, json={"messages": USER}))
        await server.until(lambda: len(engine.running) == 2)
        await stream.content.readline()
        engine.die()
        rest = await stream.content.read()
        assert rest.endswith(b"data: [DONE]\n\n") and b'"service_unavailable"' in rest
        assert (await whole).status == 503
        with pytest.raises(EngineDead, match="exit code -9"):
            await asyncio.wait_for(asyncio.shield(server.serving), 10)


async def test_a_taken_port_is_a_usage_error() -> None:
    first = bind("127.0.0.1", 0)
    first.listen()
    with pytest.raises(UsageError, match="Cannot listen"):
        bind("127.0.0.1", first.getsockname()[1])
    first.close()
    with pytest.raises(UsageError, match="Cannot listen"):
        bind("no.such.host.invalid", 0)


async def test_grammars_are_prepared_once_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    monkeypatch.setattr("llmtool.serve.server.PAUSE", 0.02)
    monkeypatch.setattr(GrammarChecker, "prepare", lambda self: prepared.append(1))
    engine = FakeEngine(says("Hello"))
    engine.stats.num_running = 1
    async with live(engine) as server:
        await asyncio.sleep(0.2)
        assert prepared == []
        engine.stats.num_running = 0
        await server.until(lambda: bool(prepared))
        await asyncio.sleep(0.1)
    assert prepared == [1]
