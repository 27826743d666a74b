"""A server of two engines as processes: kills, hangs and signals, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, logging, sys
from llmtool.config import EngineConfig, ServerConfig
from llmtool.errors import LLMToolError
from llmtool.runtime.fleet import Fleet
from llmtool.runtime.replica import Care
from llmtool.serve.server import run_server
from tests.serve.fake import tiny_tokenizer

options = json.loads(sys.argv[1])
fleets = []

async def start():
    config = EngineConfig(data_parallel_size=2, max_num_seqs=4, max_waiting=500)
    care = Care(**({"silence": 60.0, "first": 0.05, "failures": 3} | options["care"]))
    fleets.append(await Fleet.start(config, factory="tests.support.engine:build", care=care))
    if options.get("broken"):
        for replica in fleets[0].replicas:
            replica._factory = "tests.support.nothing:build"
    return fleets[0], tiny_tokenizer()

def listening(host, port):
    print(json.dumps({"port": port, "pids": [r.pid for r in fleets[0].fleet.replicas]}), flush=True)

logging.basicConfig(level=logging.INFO)
if __name__ == "__main__":
    try:
        run_server(start, ServerConfig(port=options.get("port", 0), drain_seconds=5), on_listening=listening)
    except LLMToolError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    pids: list[int]
    err: list[str] = field(default_factory=list)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, number: int, max_tokens: int = 40) -> tuple[int, Any]:
        body = {"prompt": [number % 90 + 1, 5], "max_tokens": max_tokens, "ignore_eos": True}
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/completions", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metric(self, name: str) -> float:
        return self.metrics(name)[0]

    def metrics(self, *names: str) -> list[float]:
        """Of one moment, summed over labels."""
        page, sums = self.get("/metrics")[1], []
        for name in names:
            found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.M)
            assert found, name
            sums.append(sum(map(float, found)))
        return sums


@contextmanager
def server(**options: Any) -> Iterator[Server]:
    """Killed at the end if it still runs; then no engine may be left."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps({"care": {}} | options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    found: Server | None = None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        ready = json.loads(line)
        found = Server(process, f"http://127.0.0.1:{ready['port']}", ready["pids"])
        threading.Thread(target=found.err.extend, args=(process.stderr,), daemon=True).start()
        yield found
    finally:
        process.kill()
        process.wait()
        if found is not None:
            until(lambda: not any(map(alive, found.pids)))


def alive(pid: int) -> bool:
    """A zombie is dead; where it was started by a process that is gone, nobody may come to bury it."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


def test_kill_one_under_load() -> None:
    with server() as served, ThreadPoolExecutor(24) as clients:
        answers = [clients.submit(served.complete, i) for i in range(60)]
        until(lambda: sum(a.done() for a in answers) >= 6)
        os.kill(served.pids[0], signal.SIGKILL)
        results = [a.result() for a in answers]
        lost = [body for status, body in results if status != 200]
        assert all(status in (200, 503) for status, _ in results) and len(lost) <= 4
        assert all("The engine that served this request died" in b["error"]["message"] for b in lost)
        assert served.metric("llmtool:requests_lost_total") == len(lost)
        assert served.metric("llmtool:requests_retried_total") >= 1
        until(lambda: json.loads(served.get("/health")[1])["status"] == "ok")
        assert served.metric("llmtool:replica_restarts_total") == 1
        assert served.metric("llmtool:replica_up") == 2
        assert served.complete(3)[0] == 200
        whole, parts = served.metrics(
            "vllm:generation_tokens_total", "llmtool:replica_generation_tokens_total"
        )
        assert whole == parts > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_and_leaves_nothing(number: signal.Signals) -> None:
    with server() as served, ThreadPoolExecutor(40) as clients:
        answers = [clients.submit(served.complete, i, 100) for i in range(40)]  # eight run at a time
        until(lambda: served.metric("llmtool:replica_requests_unfinished") >= 30)
        served.process.send_signal(number)
        statuses = [a.result()[0] for a in answers]
        assert set(statuses) <= {200, 503} and statuses.count(200) >= 30
        assert served.process.wait(timeout=20) == 0
        assert not any(map(alive, served.pids))
        assert not [line for line in served.err if "Traceback" in line]


def test_a_killed_server_takes_its_engines_along() -> None:
    """Also one that hangs, and hears nothing of it."""
    with server() as served:
        os.kill(served.pids[1], signal.SIGSTOP)
        served.process.kill()
        until(lambda: not any(map(alive, served.pids)), 10)


def test_a_hung_engine_is_replaced_while_the_other_serves() -> None:
    with server(care={"silence": 1.0}) as served, ThreadPoolExecutor(8) as clients:
        os.kill(served.pids[0], signal.SIGSTOP)
        results = [a.result() for a in [clients.submit(served.complete, i, 10) for i in range(8)]]
        assert [status for status, _ in results] == [200] * 8
        assert served.metric("llmtool:requests_lost_total") == 0
        until(lambda: served.metric("llmtool:replica_up") == 2)
        assert not alive(served.pids[0])


def test_no_engine_left_ends_the_server() -> None:
    with server(broken=True) as served:
        for pid in served.pids:
            os.kill(pid, signal.SIGKILL)
        assert served.process.wait(timeout=30) == 1
        until(lambda: any("All 2 replicas are dead" in line for line in served.err))


def test_a_port_in_use_is_said_before_engines_start() -> None:
    with server() as served:
        port = int(served.url.rpartition(":")[2])
        second = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps({"care": {}, "port": port})],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert second.returncode == 2 and f"Cannot listen on 127.0.0.1:{port}" in second.stderr
        assert second.stdout == ""
