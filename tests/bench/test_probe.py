from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmtool.bench.probe import LoopProbe, judge_client

CALM = [0.001] * 100
LATE = [0.001] * 95 + [0.03] * 5


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"loop_lags": CALM}, ""),
        ({"loop_lags": LATE, "median_itl_ms": 20.0}, "event loop"),
        ({"loop_lags": LATE, "median_itl_ms": 400.0}, ""),  # 30 ms are nothing to gaps of 400 ms
        ({"loop_lags": LATE}, "event loop"),
        ({"cpu_share": 0.95}, "95%"),
        ({"cpu_share": 0.5}, ""),
        ({"send_lags": [0.005]}, ""),
        ({"send_lags": [0.05], "median_ttft_ms": 50.0}, "late (p99): the load"),
        ({"send_lags": [0.05], "median_ttft_ms": 5000.0}, ""),
    ],
)
def test_what_makes_the_client_a_bottleneck(given: dict[str, Any], word: str) -> None:
    defaults: dict[str, Any] = {"loop_lags": [], "cpu_share": 0.1, "send_lags": []}
    load = judge_client(**defaults | {"median_itl_ms": None, "median_ttft_ms": None} | given)
    assert load.is_bottleneck == bool(word)
    assert word in " ".join(load.warnings)
    assert load.as_dict()["is_bottleneck"] == load.is_bottleneck


def test_share_and_lags_are_measured() -> None:
    async def main() -> LoopProbe:
        async with LoopProbe(period=0.001) as probe:
            for _ in range(10):
                await asyncio.sleep(0.005)
        return probe

    load = asyncio.run(main()).judge([], None, None)
    assert 0.0 < load.cpu_share < 1.5
    assert load.loop_lag_max_ms >= load.loop_lag_p99_ms >= load.loop_lag_p50_ms >= 0.0
