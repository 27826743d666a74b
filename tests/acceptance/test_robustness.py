"""Bad clients and many clients. Afterwards nothing runs, nothing waits and no KV page is in use."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import openai
import pytest

from tests.acceptance.servers import RunningServer

CONNECTIONS = 500
STREAMS = 20
# A client that opens STREAMS endless streams, says so when every one has brought a token, and goes on reading.
CLIENT = """
import asyncio, sys, openai

async def main():
    client = openai.AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    open_streams = []
    async def read(number):
        stream = await client.completions.create(
            model=sys.argv[2], prompt=f"Count from {number}:", max_tokens=1500, stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            if number not in open_streams:
                open_streams.append(number)
                if len(open_streams) == int(sys.argv[3]):
                    print("streaming", flush=True)
    await asyncio.gather(*map(read, range(int(sys.argv[3]))))

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def nothing_is_left(server: RunningServer) -> Iterator[None]:
    server.wait_until_idle()
    yield
    server.wait_until_idle()
    assert server.metric("llmtool:engine_alive") == 1


def still_serves(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(model=server.model, prompt="The capital of France is", max_tokens=4)
    assert answer.usage is not None and answer.usage.completion_tokens >= 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_client_killed_mid_stream(
    client: openai.OpenAI, server: RunningServer, number: signal.Signals
) -> None:
    aborted = server.finished("abort")
    arguments = [sys.executable, "-c", CLIENT, server.api, server.model, str(STREAMS)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "streaming\n"
            assert server.load()["pages used"] > 0
        finally:
            process.send_signal(number)
    server.wait_until_idle(10)
    assert server.finished("abort") == aborted + STREAMS
    still_serves(client, server)


def test_a_client_that_closes_one_stream_of_many(client: openai.OpenAI, server: RunningServer) -> None:
    request: Any = {
        "model": server.model,
        "prompt": "One",
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    staying = client.completions.create(**request, max_tokens=30)
    leaving = client.completions.create(**request, max_tokens=1500)
    next(iter(leaving))
    leaving.close()
    chunks = list(staying)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_an_unfinished_answer_is_aborted_with_its_request(server: RunningServer) -> None:
    """No stream: the connection alone says that nobody waits any more."""
    aborted = server.finished("abort")
    with pytest.raises(openai.APITimeoutError):
        openai.OpenAI(base_url=server.api, max_retries=0, timeout=1.5).completions.create(
            model=server.model, prompt="One", max_tokens=4000, n=4, extra_body={"ignore_eos": True}
        )
    server.wait_until_idle(10)
    assert server.finished("abort") == aborted + 4


def test_500_connections_at_once(server: RunningServer) -> None:
    async def main() -> list[tuple[int, str | None, int]]:
        gate = asyncio.Event()
        connected = asyncio.Semaphore(0)
        limit = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=240)

        async def ask(session: aiohttp.ClientSession, number: int) -> tuple[int, str | None, int]:
            body = {
                "model": server.model,
                "prompt": f"The number {number} is",
                "max_tokens": 4,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
            connected.release()
            await gate.wait()
            async with session.post(f"{server.api}/completions", json=body) as response:
                events = [line[6:] async for line in response.content if line.startswith(b"data: ")]
            assert events[-1].strip() == b"[DONE]"
            usage = json.loads(events[-2])["usage"]
            ends = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-2]]
            return response.status, ends[-1], usage["completion_tokens"]

        async with aiohttp.ClientSession(connector=limit, timeout=timeout) as session:
            tasks = [asyncio.create_task(ask(session, number)) for number in range(CONNECTIONS)]
            for _ in tasks:
                await connected.acquire()
            gate.set()
            await asyncio.sleep(1)
            # In the midst of it the server still answers its probes at once: in a fraction of the time that the
            # work takes, however long that is on a busy machine.
            started = time.monotonic()
            async with session.get(f"{server.url}/health") as response:
                assert response.status == 200
            probed = time.monotonic() - started
            assert not all(task.done() for task in tasks)
            answers = list(await asyncio.gather(*tasks))
            assert probed < (time.monotonic() - started) / 4
            return answers

    assert asyncio.run(main()) == [(200, "length", 4)] * CONNECTIONS


def test_500_idle_connections(client: openai.OpenAI, server: RunningServer) -> None:
    """Connected, and a third of them half a request in: they take no turn from anybody."""
    host, port = server.url.removeprefix("http://").split(":")
    sockets = [socket.create_connection((host, int(port)), timeout=10) for _ in range(CONNECTIONS)]
    try:
        for connection in sockets[::3]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        still_serves(client, server)
    finally:
        for connection in sockets:
            connection.close()
    still_serves(client, server)


def test_a_client_that_never_reads(client: openai.OpenAI, server: RunningServer) -> None:
    """Its stream fills every buffer on the way, is dropped, and meanwhile holds up nobody."""
    aborted = server.finished("abort")
    body = json.dumps(
        {
            "model": server.model,
            "prompt": "One",
            "max_tokens": 1200,
            "n": 32,
            "logprobs": 100,  # much to send per token
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        end, memory = time.monotonic() + 90, server.memory
        while server.finished("abort") == aborted:
            assert time.monotonic() < end, "the stream was never dropped"
            still_serves(client, server)
            assert server.memory < memory + 2**30, "what nobody reads should not pile up"
            time.sleep(1)
        assert server.finished("abort") == aborted + 32
        server.wait_until_idle(10)
    assert "does not read" in server.log.read_text()
