"""Speculation over HTTP: a length per request, and its figures on the metrics page."""

from __future__ import annotations

import pytest

from llmtool.bench.counters import read_counters
from llmtool.core.stats import EngineStats, SpecCounters
from tests.serve.conftest import Connect, says

pytestmark = pytest.mark.anyio


async def test_a_request_may_choose_its_length(connect: Connect) -> None:
    async with connect(says("Hello")) as client:
        for given, wanted in (("auto", None), ("off", 0), (0, 0), (16, 16), (None, None)):
            await client.complete(spec=given)
            await client.chat(spec=given)
            assert [added.params.spec for added in client.engine.added[-2:]] == [wanted, wanted]
        await client.complete()
        assert client.engine.added[-1].params.spec is None
        for bad in (-1, 17, "on", 2.5, True, [1]):
            await client.refused("/v1/completions", prompt="a", spec=bad)


async def test_metrics_say_what_was_drafted_and_learned(connect: Connect) -> None:
    explain = {
        "draft_tokens": 5,
        "goodput": 120.0,
        "cost": {"fixed": 0.01, "token": 0.002},
        "watchdog_trips": 2,
    }
    spec = SpecCounters(10, 30, 18, (9, 6, 3), 2, explain)
    async with connect(stats=EngineStats(spec=spec)) as client:
        text = (await client.http.get("/metrics")).text
    counters = read_counters(text)
    assert counters["spec_decode_num_drafts"] == 10
    assert counters["spec_decode_num_draft_tokens"] == 30
    assert counters["spec_decode_num_accepted_tokens"] == 18
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="2"} 3.0' in text
    assert 'llmtool:spec_watchdog_trips_total{model_name="tiny"} 2.0' in text
    assert 'llmtool:spec_cost_seconds{model_name="tiny",part="token"} 0.002' in text
    assert 'llmtool:spec_token_goodput{model_name="tiny"} 120.0' in text


async def test_metrics_say_nothing_where_there_is_no_speculation(connect: Connect) -> None:
    async with connect() as client:
        assert "spec_" not in (await client.http.get("/metrics")).text
