"""The routes around generation: auth, ids, CORS, models, probes, tokenize, metrics."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmtool.config import ServerConfig
from llmtool.core.stats import EngineStats
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.metrics import one_two_five
from llmtool.version import __version__
from tests.serve.conftest import Client, Connect, error_of, says
from tests.serve.fake import tiny_tokenizer

pytestmark = pytest.mark.anyio


async def test_api_key(connect: Connect) -> None:
    async with connect(config=ServerConfig(api_key="sécret")) as client:
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert (await client.http.get(path)).status_code == 200
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sécret".encode()}):
            response = await client.http.get("/v1/models", headers=header)
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer sécret".encode()}
        assert (await client.http.get("/v1/models", headers=right)).status_code == 200
        assert (await client.http.get("/openapi.json")).status_code == 401


async def test_request_ids_are_echoed_or_made(connect: Connect) -> None:
    async with connect() as client:
        given = await client.http.get("/health", headers={"X-Request-Id": "abc-123"})
        made = [(await client.http.get("/health")).headers["x-request-id"] for _ in range(2)]
        bad = await client.http.get("/health", headers={"X-Request-Id": "a b" * 100})
        error = await client.post("/v1/completions", {}, headers={"X-Request-Id": "e1"})
        stream = await client.post(
            "/v1/completions", {"prompt": "a", "stream": True}, headers={"X-Request-Id": "s1"}
        )
    assert given.headers["x-request-id"] == "abc-123"
    assert len(set(made)) == 2 and all(made)
    assert bad.headers["x-request-id"] != "a b" * 100
    assert (error.headers["x-request-id"], stream.headers["x-request-id"]) == ("e1", "s1")


async def test_cors(connect: Connect) -> None:
    origin = {"Origin": "https://a.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    async with connect(config=ServerConfig(allowed_origins=("https://a.example",), api_key="k")) as client:
        allowed = await client.http.options("/v1/completions", headers=preflight)
        assert allowed.status_code == 200  # browsers send no key with it
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = await client.http.get("/v1/models", headers=origin)  # errors are readable to scripts, too
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
        other = await client.http.get("/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
    async with connect() as client:
        assert "access-control-allow-origin" not in (await client.http.get("/health", headers=origin)).headers


async def test_head_is_get_without_the_body(connect: Connect) -> None:
    async with connect() as client:
        for path in ("/health", "/v1/models"):
            got, head = await client.http.get(path), await client.http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == got.headers["content-length"]
        assert (await client.http.head("/v1/completions")).status_code == 405
        assert not any("head" in path for path in client.app.openapi()["paths"].values())


async def test_an_empty_model_is_the_default(connect: Connect) -> None:
    async with connect() as client:
        assert (await client.complete(model=""))["model"] == "tiny"


async def test_models_and_version(connect: Connect) -> None:
    async with connect() as client:
        models = (await client.http.get("/v1/models")).json()
        one = (await client.http.get("/v1/models/tiny")).json()
        version = (await client.http.get("/version")).json()
    assert models["object"] == "list" and models["data"] == [one]
    assert (one["id"], one["root"], one["max_model_len"]) == ("tiny", "org/tiny", 512)
    assert version == {"version": __version__}


async def test_tokenize_and_back(connect: Connect) -> None:
    async with connect() as client:
        tokens = await client.ok("/tokenize", prompt="fox é", return_token_strs=True)
        back = await client.ok("/detokenize", tokens=tokens["tokens"])
        chat = await client.ok("/tokenize", messages=[{"role": "user", "content": "Hi"}])
        rendered = await client.ok("/detokenize", tokens=chat["tokens"])
        await client.refused("/tokenize", prompt="a", messages=[{"role": "user", "content": "Hi"}])
        await client.refused("/tokenize")
        await client.refused("/detokenize", tokens=[320])
        await client.refused("/detokenize", tokens=[-1])
    assert tokens["tokens"] == tiny_tokenizer().encode("fox é") and tokens["count"] == len(tokens["tokens"])
    assert "".join(tokens["token_strs"]).startswith("fox") and len(tokens["token_strs"]) == tokens["count"]
    assert back == {"prompt": "fox é"}
    assert "token_strs" not in chat
    assert rendered["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def test_draining_refuses_new_work_but_stays_alive(connect: Connect) -> None:
    async with connect() as client:
        assert (await client.http.get("/ready")).json() == {"status": "ready"}
        client.app.state.context.draining = True
        ready = await client.http.get("/ready")
        assert ready.status_code == 503 and ready.headers["retry-after"]
        assert (await client.http.get("/health")).status_code == 200
        await client.refused("/v1/completions", 503, prompt="a")


async def scrape(client: Client) -> dict[tuple[str, str], float]:
    """(sample name, its labels but model_name) -> value."""
    text = (await client.http.get("/metrics")).text
    samples = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            assert s.labels.get("model_name") == "tiny", s
            rest = ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()) if k != "model_name")
            samples[s.name, rest] = s.value
    return samples


async def test_engine_metrics_are_the_snapshot(connect: Connect) -> None:
    stats = EngineStats(
        num_running=3, num_waiting=2, pages_total=100, pages_used=25, pages_cached=10, steps=7, prompt_tokens=50,
        generation_tokens=60, prefix_queries=40, prefix_hits=30, preemptions=1,
    )  # fmt: skip
    async with connect(stats=stats) as client:
        got = await scrape(client)
    for name, value in {
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 2, "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 40, "vllm:prefix_cache_hits_total": 30, "vllm:num_preemptions_total": 1,
        "vllm:prompt_tokens_total": 50, "vllm:generation_tokens_total": 60, "llmtool:engine_steps_total": 7,
        "llmtool:engine_alive": 1,
    }.items():  # fmt: skip
        assert got[name, ""] == value, name
    assert [got["llmtool:kv_pages", f"state={s}"] for s in ("used", "cached", "free")] == [25, 10, 65]
    assert [got["llmtool:memory_bytes", f"kind={k}"] for k in ("weights", "kv_cache")] == [5000, 100 * 1024]


async def test_request_metrics_count_what_happened(connect: Connect) -> None:
    async with connect(says("one two three"), per_step=1) as client:
        tokens = len(tiny_tokenizer().encode("one two three")) + 1
        await client.complete("a", max_tokens=50)
        await client.complete("a", max_tokens=2)
        await client.complete("a", max_tokens=50, stop=" two")
        await client.refused("/v1/completions", prompt="a", n=0)
        got = await scrape(client)
    assert got["vllm:request_success_total", "finished_reason=stop"] == 2
    assert got["vllm:request_success_total", "finished_reason=length"] == 1
    assert got["vllm:request_success_total", "finished_reason=abort"] == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens"):
        assert got[f"vllm:{name}_count", ""] == 3
    # The fake's own clock: scheduled after 0.25 s, first token at 0.5 s, end at 1.5 s.
    assert (
        got["vllm:request_queue_time_seconds_sum", ""] == 0.5
    )  # not known of the one that a stop string ended
    assert got["vllm:request_time_per_output_token_seconds_bucket", "le=+Inf"] == 3
    assert got["vllm:request_time_per_output_token_seconds_sum", ""] >= 1 / (tokens - 1) + 1 / 1
    assert got["vllm:inter_token_latency_seconds_count", ""] >= (tokens - 1) + 1
    assert got["vllm:iteration_tokens_total_count", ""] >= tokens + 2
    assert got["vllm:request_generation_tokens_bucket", "le=2.0"] == 1


async def test_latencies_count_from_the_arrival_of_the_request(connect: Connect) -> None:
    class Slow(Tokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            time.sleep(0.2)
            return super().encode(text, add_special_tokens)

    known = tiny_tokenizer()
    async with connect(tokenizer=Slow(known.backend, known.special_tokens, {})) as client:
        await client.complete("a")
        got = await scrape(client)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert got[f"vllm:{name}_sum", ""] >= 0.2


async def test_failed_answers_count_as_errors(connect: Connect) -> None:
    async with connect(fail_at=2) as client:
        await client.refused("/v1/completions", 502, prompt="a", n=3)
        got = await scrape(client)
    reasons = {
        r: got["vllm:request_success_total", f"finished_reason={r}"] for r in ("stop", "abort", "error")
    }
    assert reasons == {"stop": 0, "abort": 0, "error": 3}


async def test_metrics_under_our_own_names(connect: Connect) -> None:
    async with connect(config=ServerConfig(metrics_compat="none")) as client:
        text = (await client.http.get("/metrics")).text
    assert "llmtool:num_requests_running" in text and "vllm:" not in text


def test_length_buckets() -> None:
    assert one_two_five(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)


async def test_the_memory_s_ledger(connect: Connect) -> None:
    async with connect() as client:
        client.engine.stats = EngineStats(num_running=2, preemptions=3, prefix_queries=40, prefix_hits=10)
        body = (await client.http.get("/memory")).json()
    assert sum(body["kv"]["parts"].values()) == body["kv"]["arena"] == 1024
    assert (body["model"], body["running"], body["preemptions"], body["hit_rate"]) == ("tiny", 2, 3, 0.25)
    assert body["kv"]["groups"][0]["page_bytes"] == 1024
    async with connect(config=ServerConfig(api_key="k")) as client:
        assert (await client.http.get("/memory")).status_code == 401
