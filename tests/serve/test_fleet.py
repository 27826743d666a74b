"""What a server says of several engines behind it: metrics by replica and their sums, partial failure."""

from __future__ import annotations

import pytest

from llmtool.core.stats import EngineStats, FleetView, ReplicaView, SpecCounters, past, total
from tests.serve.conftest import Connect
from tests.serve.test_service import scrape

pytestmark = pytest.mark.anyio

ONE = EngineStats(
    num_running=3, num_waiting=1, pages_total=50, pages_used=25, steps=7, prompt_tokens=50, generation_tokens=60,
    prefix_queries=40, prefix_hits=30, preemptions=1, finished={"stop": 2},
    spec=SpecCounters(4, 12, 7, (4, 2, 1), 0, {"k": 3}),
)  # fmt: skip
TWO = EngineStats(
    num_running=1, pages_total=50, steps=5, prompt_tokens=8, generation_tokens=9, finished={"stop": 1, "length": 4},
    spec=SpecCounters(1, 2, 1, (1,), 1, None),
)  # fmt: skip


def view(*states: str) -> FleetView:
    stats = (ONE, TWO)
    return FleetView(
        tuple(ReplicaView(i, "both", s, 10 + i, 4 - i, i, stats[i]) for i, s in enumerate(states)), 5, 2
    )


def test_sums() -> None:
    both = total((ONE, TWO))
    assert (both.num_running, both.pages_total, both.steps, both.generation_tokens) == (4, 100, 12, 69)
    assert both.kv_usage == 0.25 and both.finished == {"stop": 3, "length": 4}
    assert both.spec == SpecCounters(5, 14, 8, (5, 2, 1), 1, {"k": 3})
    assert total(()) == EngineStats()
    gone = past(ONE)
    assert (gone.num_running, gone.pages_total, gone.pages_used, gone.rss_bytes) == (0, 0, 0, 0)
    assert (gone.steps, gone.prefix_hits) == (7, 30) and ONE.num_running == 3


async def test_metrics_by_replica(connect: Connect) -> None:
    async with connect(stats=total((ONE, TWO)), fleet=view("up", "down")) as client:
        got = await scrape(client)
    assert got["vllm:generation_tokens_total", ""] == 69
    for name, values in {
        "up": (1, 0), "requests_running": (3, 1), "requests_waiting": (1, 0), "requests_unfinished": (4, 3),
        "kv_cache_usage": (0.5, 0), "restarts_total": (0, 1), "prompt_tokens_total": (50, 8),
        "generation_tokens_total": (60, 9), "prefix_cache_queries_total": (40, 0),
        "prefix_cache_hits_total": (30, 0), "preemptions_total": (1, 0), "engine_steps_total": (7, 5),
    }.items():  # fmt: skip
        assert tuple(got[f"llmtool:replica_{name}", f"replica={i}"] for i in range(2)) == values, name
    assert got["llmtool:requests_retried_total", ""] == 5
    assert got["llmtool:requests_lost_total", ""] == 2


async def test_one_engine_has_no_replicas(connect: Connect) -> None:
    async with connect() as client:
        assert not [name for name, _ in await scrape(client) if "replica" in name or "lost" in name]
        assert (await client.http.get("/health")).json() == {"status": "ok"}


async def test_partial_failure_is_degraded_and_serves(connect: Connect) -> None:
    async with connect(fleet=view("up", "up")) as client:
        assert (await client.http.get("/ready")).json()["status"] == "ready"
    async with connect(fleet=view("up", "dead")) as client:
        for path in ("/health", "/ready"):
            answer = await client.http.get(path)
            assert answer.status_code == 200 and answer.json() == {
                "status": "degraded",
                "replicas": [
                    {"number": 0, "role": "both", "state": "up", "restarts": 0},
                    {"number": 1, "role": "both", "state": "dead", "restarts": 1},
                ],
            }


async def test_none_up_is_not_ready_but_not_dead(connect: Connect) -> None:
    async with connect(fleet=view("down", "down")) as client:
        ready = await client.http.get("/ready")
        assert ready.status_code == 503 and ready.headers["retry-after"] == "5"
        assert "None of 2 replicas is up" in ready.json()["error"]["message"]
        assert (await client.http.get("/health")).json()["status"] == "degraded"
