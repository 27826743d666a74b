"""Real `llmtool serve` processes, and what their /metrics say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

BIN = Path(sys.prefix) / "bin"
LLMTOOL = str(BIN / "llmtool")
START_SECONDS = 120.0  # the very first start converts the model
STOP_SECONDS = 60.0
# The clients need a core, too: an engine whose second thread has to wait for one stands still at every barrier.
ONE_THREAD = ("--num-threads", "1")


@dataclass
class RunningServer:
    """url: without a trailing slash. model: its name in requests. engine_pid: the process with the weights."""

    process: subprocess.Popen[str]
    url: str
    model: str
    engine_pid: int
    log: Path

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series called `name` that carry `labels`; fails when there is none."""
        samples = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert samples, f"/metrics has no {name} {labels}"
        return sum(samples)

    @property
    def memory(self) -> int:
        """Resident bytes of the HTTP process, without the engine."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def load(self) -> dict[str, float]:
        """What is under way: all zero when the server is idle and has leaked nothing."""
        return {
            "running": self.metric("vllm:num_requests_running"),
            "waiting": self.metric("vllm:num_requests_waiting"),
            "pages used": self.metric("llmtool:kv_pages", state="used"),
        }

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while any((load := self.load()).values()):
            assert time.monotonic() < end, f"still busy after {seconds:g} s: {load}"
            time.sleep(0.1)

    def finished(self, reason: str) -> float:
        """Answers that ended so: stop | length | abort | error."""
        return self.metric("vllm:request_success_total", finished_reason=reason)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This one without settings of llmtool's that somebody may have exported."""
    kept = ("LLMTOOL_CACHE", "LLMTOOL_DATA")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLMTOOL_") or k in kept}
    return clean | dict(extra or {})


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[RunningServer]:
    """`llmtool serve ARGUMENTS` on a free port, ready. At the end it is stopped with SIGTERM, if the test has not
    ended it in its own way, and must leave exit code 0, no traceback and no process.
    """
    command = [LLMTOOL, "serve", *arguments, "--port", "0", "--json"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
        ) as process,
    ):
        try:
            server = _started(process, log)
            yield server
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(STOP_SECONDS) == 0, log.read_text()
            assert "Traceback" not in log.read_text(), log.read_text()
            wait_until_gone(server.engine_pid)
        finally:
            if process.poll() is None:
                process.kill()  # its engine sees the pipe close and ends


def _started(process: subprocess.Popen[str], log: Path) -> RunningServer:
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        said = _document(process.stdout)
        about = json.loads(said or "{}")
        if "url" not in about:  # nothing, or the error as a document
            pytest.fail(f"llmtool serve ended with {process.wait()}: {said}\n{log.read_text()}")
    finally:
        watchdog.cancel()
    server = RunningServer(process, about["url"], about["model"], about["pid"], log)
    assert json.loads(server.get("/ready")) == {"status": "ready"}
    return server


def _document(stream: IO[str]) -> str:
    """The lines up to the brace that closes the document."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if line.rstrip() == "}":
            return "".join(lines)
    return ""


def wait_until_gone(pid: int, seconds: float = 15.0) -> None:
    """A dead process that nobody has waited for yet is gone, too."""
    end = time.monotonic() + seconds
    while _state(pid) not in ("", "Z", "X"):
        assert time.monotonic() < end, f"process {pid} still lives after {seconds:g} s"
        time.sleep(0.05)


def _state(pid: int) -> str:
    """The letter of /proc/PID/stat; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def run_cli(*arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """`llmtool ARGUMENTS` to its end."""
    return subprocess.run(
        [LLMTOOL, *arguments], capture_output=True, text=True, timeout=timeout, env=environment()
    )


@contextmanager
def ahead_of_others() -> Iterator[None]:
    """What is started in here gets its cores before other programs of a busy machine, as on a quiet one. Needs the
    rights of root; without them it is a timing among others.
    """
    group = Path("/proc/self/autogroup")  # Linux weighs whole sessions first, then processes in them
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    before = group.read_text().rpartition("nice ")[2].strip() if group.exists() else None
    try:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
            if before is not None:
                group.write_text("-20")
        yield
    finally:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
            if before is not None:
                group.write_text(before)


def transport_error() -> type[Exception]:
    """What the `openai` client lets through when a stream breaks: httpx's, or since 3.0 its fork's."""
    library = openai.DefaultHttpxClient.__bases__[0].__module__.partition(".")[0]
    error: type[Exception] = import_module(library).HTTPError
    return error


def openai_client(server: RunningServer, api_key: str = "none", max_retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.api, api_key=api_key, max_retries=max_retries, timeout=120)
