"""The openai client against `llmtool serve minilm`: the embeddings that transformers computes."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llmtool.models.resolve import embedded
from tests.acceptance.servers import ONE_THREAD, RunningServer, openai_client, serving

TEXTS = [
    "The sea was calm.",
    "Gulls turned inland before the storm came over the harbour.",
    "No.",
    "x " * 200,
]


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[RunningServer]:
    with serving(logs / "minilm.log", "minilm", *ONE_THREAD) as running:
        yield running


def reference(texts: list[str]) -> np.ndarray:
    tokenizer, model = (cls.from_pretrained(embedded("minilm")) for cls in (AutoTokenizer, AutoModel))
    rows = []
    for text in texts:
        with torch.inference_mode():
            row = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        rows.append((row / row.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_embeddings_are_those_of_transformers(server: RunningServer, encoding: str) -> None:
    client = openai_client(server)
    answer = client.embeddings.create(model="minilm", input=TEXTS, encoding_format=encoding)  # type: ignore[call-overload]
    assert [row.index for row in answer.data] == [0, 1, 2, 3] and answer.usage.prompt_tokens > 200
    rows = [row.embedding for row in answer.data]
    # With an explicit base64 the client hands the text on as it came.
    ours = np.array([np.frombuffer(base64.b64decode(r), "<f4") if isinstance(r, str) else r for r in rows])
    assert ((ours * reference(TEXTS)).sum(1) > 0.999).all()


def test_the_clients_default_and_token_ids(server: RunningServer) -> None:
    client = openai_client(server)
    by_text = client.embeddings.create(model="minilm", input="No.").data[0].embedding
    ids = AutoTokenizer.from_pretrained(embedded("minilm"))("No.").input_ids
    by_ids = client.embeddings.create(model="minilm", input=[ids, ids]).data
    assert len(by_text) == 384
    for row in by_ids:
        np.testing.assert_allclose(row.embedding, by_text, atol=1e-6)


def test_errors_and_metrics(server: RunningServer) -> None:
    client = openai_client(server)
    with pytest.raises(openai.BadRequestError, match="256 tokens"):
        client.embeddings.create(model="minilm", input="word " * 400)
    with pytest.raises(openai.BadRequestError, match="encoder"):
        client.completions.create(model="minilm", prompt="x")
    before = server.finished("stop")
    client.embeddings.create(model="minilm", input=["a"] * 300)
    assert server.finished("stop") == before + 300
    server.wait_until_idle()
