"""How a server ends: drained on SIGTERM, loudly when its engine dies, and never leaving a process behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.acceptance.servers import (
    ONE_THREAD,
    RunningServer,
    openai_client,
    serving,
    transport_error,
    wait_until_gone,
)

ENDLESS: Any = {"max_tokens": 2000, "stream": True, "extra_body": {"ignore_eos": True}}


def open_streams(server: RunningServer, count: int, **request: Any) -> list[Any]:
    """Iterators of `count` completions that have each brought a chunk."""
    client = openai_client(server)
    streams = [
        iter(client.completions.create(model=server.model, prompt=f"{n}:", **request)) for n in range(count)
    ]
    for stream in streams:
        next(stream)
    return streams


def test_sigterm_drains(logs: Path) -> None:
    with serving(logs / "drain.log", *ONE_THREAD) as server:
        (stream,) = open_streams(server, 1, **ENDLESS | {"max_tokens": 60})
        server.process.send_signal(signal.SIGTERM)
        refused = None
        while refused is None:
            try:
                server.get("/ready")
            except urllib.error.HTTPError as error:
                refused = error
        assert refused.code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            openai_client(server).completions.create(model=server.model, prompt="x")
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) >= 50
        assert server.process.wait(20) == 0


def test_a_drain_has_an_end(logs: Path) -> None:
    with serving(logs / "short-drain.log", *ONE_THREAD, "--drain-seconds", "1") as server:
        streams = open_streams(server, 3, **ENDLESS)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            with pytest.raises(openai.APIError, match="stopped before"):
                list(stream)
        assert server.process.wait(20) == 0
        assert 1 <= time.monotonic() - started < 15


def test_a_second_signal_ends_at_once(logs: Path) -> None:
    with serving(logs / "second-signal.log", *ONE_THREAD) as server:
        streams = open_streams(server, 2, **ENDLESS)
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        server.process.wait(15)
        for stream in streams:
            with pytest.raises((openai.APIError, transport_error())):
                list(stream)


def test_the_death_of_a_busy_engine(logs: Path) -> None:
    with serving(logs / "killed-engine.log", *ONE_THREAD) as server:
        host = server.url.removeprefix("http://")
        ends: list[str] = []

        def read(number: int) -> None:
            body = {"prompt": f"{number}", "max_tokens": 2000, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"http://{host}/v1/completions", json=body, timeout=60) as response:
                lines = [line for line in response.iter_lines() if line]
            ends.append(lines[-2] if lines[-1] == "data: [DONE]" else lines[-1])

        readers = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for reader in readers:
            reader.start()
        while server.metric("vllm:num_requests_running") < 8:
            time.sleep(0.1)
        os.kill(server.engine_pid, signal.SIGKILL)
        for reader in readers:
            reader.join(20)
        assert len(ends) == 8
        for last in ends:
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["type"] == "service_unavailable" and "engine" in error["message"].lower()
        assert server.process.wait(20) == 1
        log = server.log.read_text()
        assert "engine" in log.lower() and "-9" in log
        with pytest.raises(openai.APIConnectionError):
            openai_client(server).models.list()


def test_the_death_of_an_idle_engine(logs: Path) -> None:
    with serving(logs / "killed-idle-engine.log", *ONE_THREAD) as server:
        os.kill(server.engine_pid, signal.SIGKILL)
        assert server.process.wait(20) == 1


@pytest.mark.parametrize("busy", [False, True])
def test_the_engine_ends_with_a_killed_server(logs: Path, busy: bool) -> None:
    with serving(logs / f"killed-server-{busy}.log", *ONE_THREAD) as server:
        streams = open_streams(server, 2, **ENDLESS) if busy else []
        server.process.kill()
        server.process.wait()
        wait_until_gone(server.engine_pid)
        for stream in streams:
            with pytest.raises((openai.APIError, transport_error())):
                list(stream)
