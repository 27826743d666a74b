"""The Ray Serve recipe on a local cluster of several processes: two nodes, replicas that come and go with the load.
Skipped where Ray is not installed (`pip install 'llmtool[ray]'`)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmtool.core.engine import Engine
from llmtool.core.ports import RealClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.errors import UsageError
from llmtool.runtime.build import build as build_engine
from llmtool.runtime.parts import EngineParts
from tests.models.conftest import build as build_reference
from tests.runtime.test_fleet_equality import config_of
from tests.serve.fake import tiny_tokenizer

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'llmtool[ray]'")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'llmtool[ray]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "ray-serve"
PORT = 18471
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def deployment() -> Iterator[Any]:
    sys.path.insert(0, str(RECIPE))
    try:
        import deployment as recipe

        yield recipe
    finally:
        sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 320, "max_position_embeddings": 160, "num_hidden_layers": 2}
    build_reference("llama", **sizes).save_pretrained(directory)
    tiny_tokenizer().backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return directory


@pytest.fixture
def cluster() -> Iterator[None]:
    """A head and a second node, each with processes of its own."""
    from ray.cluster_utils import Cluster

    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(RECIPE)])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(
            address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}}
        )
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def complete(prompt: list[int], max_tokens: int) -> tuple[str, int]:
    """The text, and how many tokens it has."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{URL}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.loads(response.read())
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def engines() -> set[int]:
    """Engine processes under this cluster's replicas, by their command line and their parent's name."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdecimal() or b"spawn_main" not in (entry / "cmdline").read_bytes():
                continue
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if b"ServeReplica" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.2)


def running() -> int:
    replicas = serve.status().applications["default"].deployments["llmtool"].replica_states
    return int(replicas.get("RUNNING", 0))


def alone(model: Path, prompts: list[list[int]], count: int) -> list[str]:
    """The texts of one engine in this process."""
    parts = build_engine(config_of(model), lambda text, fraction: None)
    assert isinstance(parts, EngineParts)
    engine = Engine(Scheduler(parts.scheduler, parts.allocator()), parts.executor, RealClock())
    answers: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            answers[int(output.request_id)] += output.token_ids
    return [tiny_tokenizer().decode(tokens, skip_special_tokens=True) for tokens in answers]


def test_replicas_come_with_the_load_and_are_replaced(deployment: Any, model: Path, cluster: None) -> None:
    settings = {
        "model": model, "dtype": "float32", "device": "cpu", "block_size": 4, "max_model_len": 160,
        "min_replicas": 1, "max_replicas": 3, "requests": 1, "upscale_delay": 1, "cpus": 1,
    }  # fmt: skip
    serve.run(deployment.build(settings), name="default", route_prefix="/")
    prompts = [[1 + i % 9, 5, 7, 2 + i] for i in range(12)]
    texts = alone(model, prompts, 20)
    assert [complete(p, 20) for p in prompts] == [(text, 20) for text in texts]
    assert running() == len(engines()) == 1
    with urllib.request.urlopen(f"{URL}/health", timeout=30) as response:
        assert json.loads(response.read()) == {"status": "ok"}

    # Load: more replicas come, and all say the same.
    with ThreadPoolExecutor(8) as clients:
        deadline = time.monotonic() + 150
        while running() < 2:
            assert time.monotonic() < deadline, "no second replica came"
            answers = list(clients.map(lambda p: complete(p, 140), prompts))
            assert all(count == 140 for _, count in answers)
    assert len(engines()) >= 2
    assert [complete(p, 20) for p in prompts] == [(text, 20) for text in texts]

    # An engine dies: Ray replaces its replica, and serves on.
    for pid in engines():
        os.kill(pid, signal.SIGKILL)
    dead = engines()

    def back() -> bool:
        try:
            return complete(prompts[0], 20) == (texts[0], 20)
        except OSError:
            return False

    until(back)
    serve.delete("default")
    until(lambda: not engines() and not dead & engines())


def test_arguments_are_settings(deployment: Any) -> None:
    application = deployment.build(
        {"model": "smollm2-135m", "max_num_seqs": "8", "max_replicas": "7", "cpus": 2}
    )
    made = application._bound_deployment
    assert made._deployment_config.autoscaling_config.max_replicas == 7
    engine, _ = made.init_args
    assert (engine.max_num_seqs, engine.num_threads) == (8, 2)
    with pytest.raises(UsageError, match="Unknown setting 'max_replica'"):
        deployment.build({"max_replica": 1})
