"""The server as a process: signals, exit codes, and what it imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAM = """
import logging, sys
from llmtool.config import ServerConfig
from llmtool.errors import LLMToolError
from llmtool.serve.server import run_server
from tests.serve.fake import FakeEngine, tiny_tokenizer

logging.basicConfig(level=logging.INFO)

async def start():
    text = tiny_tokenizer().encode("one two three four five six") * int(sys.argv[2] if len(sys.argv) > 2 else 1)
    engine = FakeEngine(lambda prompt, params, index: [*text, 2], delay=0.05)
    if float(sys.argv[1] if len(sys.argv) > 1 else 0):
        import asyncio
        asyncio.get_running_loop().call_later(float(sys.argv[1]), engine.die)
    return engine, tiny_tokenizer()

try:
    run_server(start, ServerConfig(port=0), on_listening=lambda host, port: print(port, flush=True))
except LLMToolError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
heavy = {"torch", "transformers"} & set(sys.modules)
print(f"clean end, heavy imports: {sorted(heavy)}", flush=True)
"""


@contextmanager
def server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, base URL); killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port.isdigit(), process.stderr.read() if process.stderr else ""
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(number: signal.Signals) -> None:
    with server() as (process, url):
        body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 50, "guided_choice": ["x"]}).encode()
        request = urllib.request.Request(
            f"{url}/v1/completions", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            first = response.readline()
            process.send_signal(number)
            rest = response.read()
        assert first.startswith(b"data: ") and rest.endswith(b"data: [DONE]\n\n") and b'"stop"' in rest
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out == "clean end, heavy imports: []\n"  # a grammar was checked, too
    assert "Traceback" not in err and "draining" in err


def test_a_second_signal_cuts_the_drain_short() -> None:
    with server("0", "1000") as (process, url):
        body = json.dumps({"prompt": "a", "stream": True, "ignore_eos": True, "max_tokens": 500}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            response.readline()
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None and any("draining" in line for line in process.stderr)
            process.send_signal(signal.SIGINT)
            # 500 tokens take 25 seconds, and the drain would wait for 30.
            assert process.wait(timeout=15) == 0
            rest = response.read()
    assert b"The server stopped before this answer was complete." in rest and rest.endswith(
        b"data: [DONE]\n\n"
    )


def test_the_engines_death_ends_the_process_loudly() -> None:
    with server("0.2") as (process, _):
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "engine died" in err and "CRITICAL" in err


def test_importing_the_server_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, llmtool.serve.server; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
