"""A plan's way to a running server, and back: plan, serve it, ask it, bench it, calibrate from the bench."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from llmtool.errors import LLMToolError
from llmtool.models.resolve import resolve


def llmtool(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "llmtool", *arguments, "--json", "-q"],
        capture_output=True,
        text=True,
        env={**os.environ, "LLMTOOL_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def get(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_plan_is_served_benched_and_calibrated(tmp_path: Path) -> None:
    try:
        resolve("smollm2-135m")
    except LLMToolError:
        pytest.skip("the embedded model is not installed")
    file, result = str(tmp_path / "plan.toml"), str(tmp_path / "measured.json")
    load = ["--input-len", "24", "--output-len", "8", "--max-concurrency", "2", "--num-prompts", "6"]
    cpu = ["--device", "cpu", "--num-devices", "1", "--engine", "llmtool", "--max-model-len", "128"]
    planned = llmtool(tmp_path, "plan", "smollm2-135m", *cpu, *load, "--max-num-seqs", "4", "-o", file)
    assert planned["launch"]["llmtool"].endswith(f"serve --plan {file}")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    limits = ["--kv-cache-memory", "64MiB", "--log-level", "error"]
    server = subprocess.Popen(
        [sys.executable, "-m", "llmtool", "serve", "--plan", file, "--port", port, *limits],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            assert server.poll() is None
            try:
                get(f"{url}/ready")
                break
            except OSError:
                time.sleep(0.2)
        (model,) = get(f"{url}/v1/models")["data"]
        assert model["max_model_len"] == 128
        body = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        assert get(f"{url}/v1/completions", body)["usage"]["completion_tokens"] == 8
        llmtool(tmp_path, "bench", "--url", url, "--dataset-name", "random", "--random-input-len", "24",
                "--random-output-len", "8", "--max-concurrency", "2", "--num-prompts", "6", "--ignore-eos",
                "-o", result)  # fmt: skip
    finally:
        server.terminate()
        server.wait(30)
    fitted = llmtool(tmp_path, "plan", "--calibrate", result, "--plan", file)
    assert (fitted["device"], fitted["engine"]) == ("cpu", "llmtool")
    far, near = (max(abs(f[k] / f["measured"] - 1) for f in fitted["figures"]) for k in ("before", "after"))
    assert near < far
    again = llmtool(tmp_path, "plan", "smollm2-135m", *cpu, *load, "--max-num-seqs", "4")
    assert again["tier"] == "calibrated" and again["error_band"] < planned["error_band"]
