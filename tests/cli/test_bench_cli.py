"""`llmtool bench` from outside, against a mock server in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SMALL = ("--num-prompts", "12", "--random-input-len", "8", "--random-output-len", "4", "--num-warmups", "0")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    mock = [sys.executable, "-m", "llmtool.bench.mock", "--ttft", "0.002", "--itl", "0.001"]
    with subprocess.Popen(mock, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def bench(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLMTOOL_")}
    return subprocess.run(
        [sys.executable, "-m", "llmtool", "bench", *args],
        capture_output=True,
        text=True,
        env=clean | {"NO_COLOR": "1", "COLUMNS": "200"} | (env or {}),
    )


def test_a_knee_that_was_found_is_shown(url: str, tmp_path: Path) -> None:
    file = tmp_path / "knee.json"
    limits = ("--knee-min-rate", "20", "--knee-max-rate", "40", "--knee-max-runs", "2")
    done = bench(
        "--url", url, *SMALL, "--search-knee", *limits, "--goodput", "e2el:60000", "-o", str(file)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["knee"]["request_rate"] == 40
    assert "Highest rate that held: 40 requests/s" in done.stdout
