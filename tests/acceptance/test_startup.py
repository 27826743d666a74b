"""From the command to the first token, and how soon --help answers."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.acceptance.servers import (
    LLMTOOL,
    RunningServer,
    ahead_of_others,
    environment,
    openai_client,
    run_cli,
    serving,
)


def seconds_to_first_token(log: Path) -> float:
    """Of `llmtool serve` and a client that asks as soon as it hears the address."""
    started = time.monotonic()
    with ahead_of_others(), serving(log) as server:
        stream = openai_client(server).completions.create(
            model=server.model, prompt="Hello", max_tokens=4, stream=True
        )
        next(iter(stream))
        return time.monotonic() - started


@pytest.mark.usefixtures("model_dir")
def test_the_first_token_comes_within_5_seconds(logs: Path) -> None:
    measured = [seconds_to_first_token(logs / f"startup-{i}.log") for i in range(3)]
    assert min(measured) < 5, f"command to first token: {[f'{s:.2f} s' for s in measured]}"
    print(f"command to first token: {min(measured):.2f} s, best of {[f'{s:.2f}' for s in measured]}")


def test_help_answers_within_half_a_second() -> None:
    def seconds(*arguments: str) -> float:
        started = time.monotonic()
        with ahead_of_others():
            done = run_cli(*arguments)
        assert done.returncode == 0 and "serve" in done.stdout
        return time.monotonic() - started

    for arguments in (("--help",), ("serve", "--help")):
        measured = [seconds(*arguments) for _ in range(5)]
        assert min(measured) < 0.5, f"llmtool {' '.join(arguments)}: {[f'{s:.2f} s' for s in measured]}"
        print(f"llmtool {' '.join(arguments)}: {min(measured):.2f} s")


@pytest.mark.usefixtures("model_dir")
def test_a_signal_while_loading_ends_it() -> None:
    # A shell starts what runs in its background with SIGINT ignored, which the server would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signals_end_it()
    finally:
        signal.signal(signal.SIGINT, before)


def signals_end_it() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            [LLMTOOL, "serve", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process:
            time.sleep(1.0)
            process.send_signal(number)
            try:
                out, err = process.communicate(timeout=20)
            finally:
                process.kill()  # one that did not hear it would be waited for without end
            assert process.returncode in (130, -number, 0, 128 + number), err
            assert out == "" and "Traceback" not in err, err


def test_two_servers_do_not_share_a_port(server: RunningServer) -> None:
    port = server.url.rpartition(":")[2]
    done = run_cli("serve", "--port", port, "--json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert port in json.loads(done.stdout)["error"]["message"]
