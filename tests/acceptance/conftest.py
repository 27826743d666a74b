"""Servers and data of the acceptance tests. What is missing is a failure here, never a skip."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before any client is imported: no test may ask the internet for anything.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "DO_NOT_TRACK": "1",
    "OPENAI_API_KEY": "none",
    "TOKENIZERS_PARALLELISM": "false",
}

import openai
import pytest

from llmtool.models.resolve import resolve
from tests.acceptance.servers import ONE_THREAD, RunningServer, openai_client, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data() -> Path:
    path = Path(os.environ.get("LLMTOOL_DATA", ROOT.parent / "shared" / "data"))
    assert path.is_dir(), f"No test data at {path}: set LLMTOOL_DATA."
    return path


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def server(logs: Path) -> Iterator[RunningServer]:
    """The embedded SmolLM2 in its default dtype."""
    with serving(logs / "server.log", *ONE_THREAD, "--kv-cache-memory", "1GiB") as running:
        yield running


@pytest.fixture(scope="session")
def exact_server(logs: Path) -> Iterator[RunningServer]:
    """In float32, where an answer does not depend on what else is in the batch."""
    with serving(
        logs / "exact.log", *ONE_THREAD, "--dtype", "float32", "--kv-cache-memory", "1GiB"
    ) as running:
        yield running


@pytest.fixture(scope="session")
def model_dir(server: RunningServer) -> Path:
    """The embedded model as a Hugging Face directory, converted by the server's start: what transformers and the
    clients' tokenizers read.
    """
    return resolve(server.model)


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai_client(server) as made:
        yield made


@pytest.fixture(scope="session")
def exact_client(exact_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai_client(exact_server) as made:
        yield made
