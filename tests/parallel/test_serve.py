"""The commands: a plan served verbatim, flags, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from llmtool.config import EngineConfig
from llmtool.errors import UsageError
from tests.parallel.test_faults import children, wait_gone
from tests.parallel.test_nodes import tiny as tiny  # the fixture, with a tokenizer
from tests.runtime.tiny import TinyModel

PLAN = """
model = "{model}"
max_model_len = 96
max_num_seqs = 4
max_num_batched_tokens = 32
block_size = 4
enable_prefix_caching = true
dtype = "float32"

[plan]
version = 1
device = "cpu"
engine = "llmtool"
weights = "fp32"
kv_cache = "fp32"
tensor_parallel = 2
pipeline_parallel = 2
data_parallel = 1
expert_parallel = 1
attention_data_parallel = 1
layers = [1, 1]
"""


def test_a_plan_is_served_verbatim(tiny: TinyModel, tmp_path: Path) -> None:
    plan, log = tmp_path / "plan.toml", tmp_path / "log"
    plan.write_text(PLAN.format(model=tiny.directory))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llmtool", "serve", "--plan", str(plan), "--port", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen([*command, "--num-threads", "1"], stdout=file, stderr=file)
    workers: list[int] = []
    try:
        deadline = time.monotonic() + 90
        while b"Serving" not in log.read_bytes():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        (engine,) = [pid for pid in descendants(server.pid) if children(pid)]
        workers = children(engine)
        assert len(workers) == 3
        body = {"model": "m", "prompt": [7, 8, 9], "max_tokens": 10, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body | {"model": str(tiny.directory)}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
        assert [int(word) for word in text.split()] == tiny.greedy([7, 8, 9], 10)
        server.send_signal(signal.SIGTERM)
        assert server.wait(40) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        wait_gone([server.pid, *workers])


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def llmtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "llmtool", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_flags_reach_the_settings() -> None:
    flags = ["-tp", "2", "-pp", "3", "--pipeline-layers", "1,2,3", "--enable-expert-parallel"]
    flags += ["--distributed-timeout-seconds", "7"]
    shown = json.loads(llmtool("serve", *flags, "--print-config", "--json").stdout)
    assert (shown["tensor_parallel_size"], shown["pipeline_parallel_size"]) == (2, 3)
    assert shown["pipeline_layers"] == [1, 2, 3] and shown["enable_expert_parallel"] is True
    assert shown["distributed_timeout_seconds"] == 7.0
    done = llmtool("bench", *flags, "--nnodes", "2", "--node-rank", "1", "--master-port", "29500")
    assert done.returncode == 2 and "bench runs on node 0" in done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"nnodes": 2, "node_rank": 2}, "node_rank is 2, and 2 nodes have ranks 0 to 1"),
        ({"nnodes": 2}, "need a port to meet at"),
        ({"master_port": 70000}, "between 0 and 65535"),
        ({"distributed_timeout_seconds": 0.0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        EngineConfig(**settings)  # type: ignore[arg-type]
