"""/v1/embeddings, /v1/classify, /v1/score and /v1/rerank over a fake encoder; decoders refuse, encoders too."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.parts import PoolingInfo
from tests.serve.conftest import Connect, error_of
from tests.serve.fake import Info, fake_vector, tiny_tokenizer

pytestmark = pytest.mark.anyio

EMBED = PoolingInfo("embed", 4, normalized=True, matryoshka=True)
PLAIN = PoolingInfo("embed", 4)
LABELS = PoolingInfo("classify", 3, labels=("no", "maybe", "yes"))
CROSS = PoolingInfo("classify", 1, labels=("LABEL_0",))


def info(pooling: PoolingInfo, **facts: Any) -> Info:
    return Info(pooling=pooling, num_pages=0, page_bytes=0, **facts)


def bert_tokenizer() -> Tokenizer:
    """Words, and [CLS] text [SEP] as BERT has it."""
    words = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abcdefghij"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    return Tokenizer(backend, {}, {})


def unit(token_ids: list[int], size: int = 4) -> list[float]:
    row = fake_vector(token_ids, 4)[:size]
    return (row / np.linalg.norm(row)).tolist()


async def test_all_shapes_of_input(connect: Connect) -> None:
    ids = tiny_tokenizer().encode("Hello world")
    async with connect(info=info(PLAIN)) as client:
        for given, count in (
            ("Hello world", 1),
            (["Hello world", "Hello world"], 2),
            (ids, 1),
            ([ids, ids, ids], 3),
        ):
            body = await client.ok("/v1/embeddings", input=given, model="tiny")
            assert body["object"] == "list" and body["model"] == "tiny" and body["id"].startswith("embd-")
            assert [row["index"] for row in body["data"]] == list(range(count))
            assert all(row["object"] == "embedding" for row in body["data"])
            assert all(row["embedding"] == fake_vector(ids, 4).tolist() for row in body["data"])
            assert body["usage"] == {"prompt_tokens": count * len(ids), "total_tokens": count * len(ids)}
            assert client.engine.pooled[-1].inputs == [ids] * count
        assert not client.engine.aborted


async def test_base64_is_float32_little_endian(connect: Connect) -> None:
    async with connect(info=info(PLAIN)) as client:
        body = await client.ok("/v1/embeddings", input=[[3, 4], [5]], encoding_format="base64")
        rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in body["data"]]
        np.testing.assert_array_equal(rows, [fake_vector([3, 4], 4), fake_vector([5], 4)])


async def test_many_texts_are_tokenized_in_order(connect: Connect) -> None:
    texts = [f"{'fox ' * (i % 40)}{i}" for i in range(300)]
    async with connect(info=info(PLAIN)) as client:
        body = await client.ok("/v1/embeddings", input=texts)
        assert len(body["data"]) == 300
        assert client.engine.pooled[0].inputs == [tiny_tokenizer().encode(text) for text in texts]


async def test_dimensions_cut_and_normalize_again(connect: Connect) -> None:
    async with connect(info=info(EMBED)) as client:
        body = await client.ok("/v1/embeddings", input=[[3, 4]], dimensions=3)
        np.testing.assert_allclose(body["data"][0]["embedding"], unit([3, 4], 3), rtol=1e-6)
        error = await client.refused("/v1/embeddings", input="x", dimensions=5)
        assert error["param"] == "dimensions" and "at most 4" in error["message"]
    async with connect(info=info(PLAIN)) as client:
        await client.ok("/v1/embeddings", input="x", dimensions=4)
        error = await client.refused("/v1/embeddings", input="x", dimensions=2)
        assert error["param"] == "dimensions" and "cannot be cut" in error["message"]
    async with connect(info=info(PoolingInfo("embed", 4, matryoshka=True, sizes=(2, 4)))) as client:
        assert len((await client.ok("/v1/embeddings", input="x", dimensions=2))["data"][0]["embedding"]) == 2
        assert "one of 2, 4" in (await client.refused("/v1/embeddings", input="x", dimensions=3))["message"]


async def test_too_long_says_how_long_and_truncation_keeps_the_frame(connect: Connect) -> None:
    async with connect(info=info(PLAIN, max_model_len=5), tokenizer=bert_tokenizer()) as client:
        error = await client.refused("/v1/embeddings", input=["a", "a b c d"])
        assert error["code"] == "context_length_exceeded" and error["param"] == "input"
        assert "5 tokens" in error["message"] and "input[1] has 6 tokens" in error["message"]
        error = await client.refused("/v1/embeddings", input=[[3] * 6])
        assert "input[0] has 6 tokens" in error["message"]
        error = await client.refused("/v1/embeddings", input="a" * 10_000)
        assert "10000 characters" in error["message"]
        for keep, wanted in ((-1, [1, 3, 4, 5, 2]), (4, [1, 3, 4, 2]), (2, [1, 2]), (1, [1]), (9, None)):
            if wanted is None:
                await client.refused("/v1/embeddings", input="a b c d", truncate_prompt_tokens=keep)
                continue
            await client.ok("/v1/embeddings", input="a b c d", truncate_prompt_tokens=keep)
            assert client.engine.pooled[-1].inputs == [wanted]
        await client.ok("/v1/embeddings", input=[[3, 4, 5, 6, 7, 8]], truncate_prompt_tokens=3)
        assert client.engine.pooled[-1].inputs == [[3, 4, 5]]  # given tokens have no frame to keep
        await client.ok("/v1/embeddings", input="a b", add_special_tokens=False)
        assert client.engine.pooled[-1].inputs == [[3, 4]]
        error = await client.refused("/v1/embeddings", input="a", truncate_prompt_tokens=0)
        assert error["param"] == "truncate_prompt_tokens"


async def test_the_models_own_prompt_and_case(connect: Connect) -> None:
    pooling = PoolingInfo("embed", 4, prompt="Query: ", lowercase=True)
    async with connect(info=info(pooling)) as client:
        await client.ok("/v1/embeddings", input="The Fox")
        assert client.engine.pooled[-1].inputs == [tiny_tokenizer().encode("query: the fox")]


async def test_classify(connect: Connect) -> None:
    async with connect(info=info(LABELS)) as client:
        body = await client.ok("/v1/classify", input=[[3], [4, 5]])
        for row, ids in zip(body["data"], ([3], [4, 5]), strict=True):
            probs = fake_vector(ids, 3)
            assert row["probs"] == probs.tolist() and row["num_classes"] == 3
            assert row["label"] == LABELS.labels[int(probs.argmax())]
        assert body["usage"]["prompt_tokens"] == 3
        assert "/v1/classify" in (await client.refused("/v1/embeddings", input="x"))["message"]
        assert "3 labels" in (await client.refused("/v1/score", text_1="a", text_2="b"))["message"]
    async with connect(info=info(PLAIN)) as client:
        assert "/v1/embeddings" in (await client.refused("/v1/classify", input="x"))["message"]


async def test_scores_of_embeddings_are_cosines(connect: Connect) -> None:
    encode = tiny_tokenizer().encode
    async with connect(info=info(PLAIN)) as client:
        body = await client.ok("/v1/score", text_1="fox", text_2=["dog", "fox"])
        expected = [float(np.dot(unit(encode("fox")), unit(encode(text)))) for text in ("dog", "fox")]
        np.testing.assert_allclose([row["score"] for row in body["data"]], expected, rtol=1e-5)
        body = await client.ok("/v1/score", text_1=["fox", "a"], text_2=["fox", "a"])
        np.testing.assert_allclose([row["score"] for row in body["data"]], 1.0, rtol=1e-5)
        error = await client.refused("/v1/score", text_1=["a", "b"], text_2=["a"])
        assert error["param"] == "text_1"


async def test_a_cross_encoder_reads_pairs(connect: Connect) -> None:
    async with connect(info=info(CROSS), tokenizer=bert_tokenizer()) as client:
        body = await client.ok("/v1/rerank", query="a b", documents=["c", "d e", "f"], top_n=2)
        pooled = client.engine.pooled[-1]
        pairs = [[1, 3, 4, 2, 5, 2], [1, 3, 4, 2, 6, 7, 2], [1, 3, 4, 2, 8, 2]]
        assert pooled.inputs == pairs and pooled.segments == (4, 4, 4)
        scores = [float(fake_vector(pair, 1)[0]) for pair in pairs]
        best = sorted(range(3), key=lambda i: (-scores[i], i))[:2]
        assert [row["index"] for row in body["results"]] == best
        assert [row["relevance_score"] for row in body["results"]] == [scores[i] for i in best]
        assert body["results"][0]["document"] == {"text": ["c", "d e", "f"][best[0]]}


async def test_encoders_and_decoders_refuse_what_they_are_not(connect: Connect) -> None:
    async with connect(info=info(PLAIN)) as client:
        for path, body in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            error = await client.refused(path, **body)
            assert "encoder" in error["message"] and "/v1/embeddings" in error["message"]
        assert (await client.ok("/tokenize", prompt="fox"))["count"] > 0
        assert (await client.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
    async with connect() as client:
        for path, body in (
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/classify", {"input": "x"}),
            ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ):
            assert "generates text" in (await client.refused(path, **body))["message"]


async def test_wrong_bodies_name_the_field(connect: Connect) -> None:
    async with connect(info=info(PLAIN)) as client:
        for body, param in (
            ({"input": []}, "input"),
            ({"input": [[]]}, "input[0]"),
            ({"input": [1, "a"]}, "input[1]"),
            ({"input": [[320]]}, "input"),
            ({"input": ""}, "input"),
            ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
            ({"input": "x", "dimensions": 0}, "dimensions"),
            ({}, "input"),
        ):
            assert (await client.refused("/v1/embeddings", **body))["param"] == param
        await client.refused("/v1/embeddings", 404, input="x", model="other")


async def test_failures_and_full_queues(connect: Connect) -> None:
    async with connect(info=info(PLAIN), fail_at=1) as client:
        error = error_of(await client.post("/v1/embeddings", {"input": ["a", "b", "c"]}))
        assert error["type"] == "generation_error" and "cursed" in error["message"]
        assert len(client.engine.aborted) == 1  # the first input no longer matters
    async with connect(info=info(PLAIN), max_requests=0) as client:
        response = await client.post("/v1/embeddings", {"input": "a"})
        assert response.status_code == 429 and response.headers["retry-after"] == "3"


async def test_a_client_that_leaves_aborts(connect: Connect) -> None:
    async with connect(info=info(PLAIN), delay=5.0) as client:
        received = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not received.is_set():
                received.set()
                return {"type": "http.request", "body": b'{"input": ["a", "b"]}', "more_body": False}
            while not client.engine.pooled:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/embeddings",
            "raw_path": b"/v1/embeddings",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await asyncio.wait_for(client.app(scope, receive, send), 3)  # type: ignore[arg-type]
        assert [name for name, _ in client.engine.aborted] == [client.engine.pooled[0].request_id]
        text = (await client.http.get("/metrics")).text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in text


async def test_metrics_count_inputs(connect: Connect) -> None:
    async with connect(info=info(PLAIN)) as client:
        await client.ok("/v1/embeddings", input=[[3], [4, 5], [6, 7, 8]])
        text = (await client.http.get("/metrics")).text
        assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 3.0' in text
        assert 'vllm:request_prompt_tokens_sum{model_name="tiny"} 6.0' in text
        assert 'vllm:e2e_request_latency_seconds_count{model_name="tiny"} 1.0' in text
        assert 'vllm:request_queue_time_seconds_sum{model_name="tiny"} 0.75' in text
