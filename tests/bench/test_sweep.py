"""The knee search against simulated servers whose knee is known."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.bench.config import LoadConfig
from llmtool.bench.result import RunResult
from llmtool.bench.sweep import find_knee, holds, sweep


def metrics(
    attained: float | None = 1.0, met: bool = True, completed: int = 100, failed: int = 0
) -> dict[str, Any]:
    return {
        "completed": completed,
        "failed": failed,
        "slo_attainment": attained,
        "slos": [{"slo": "ttft:100", "attained": attained}, {"slo": "ttft:p99:500", "met": met}],
        "request_throughput": 0.0,
    }


class Server:
    """Completes `capacity` requests/s at most and holds its objectives up to `knee`."""

    def __init__(self, knee: float, capacity: float) -> None:
        self.knee, self.capacity = knee, capacity
        self.rates: list[float] = []

    async def measure(self, rate: float) -> RunResult:
        self.rates.append(rate)
        done = min(rate, self.capacity)
        values = metrics(met=rate <= self.knee) | {"request_throughput": done, "duration": 100 / done}
        return RunResult(rate, values)


@settings(deadline=None)
@given(st.floats(0.6, 200.0), st.floats(1.0, 1.8))
def test_the_knee_is_found_within_the_tolerance(knee: float, headroom: float) -> None:
    server = Server(knee, knee * headroom)
    runs, found = asyncio.run(find_knee(server.measure, LoadConfig(knee_tolerance=0.1, knee_max_runs=16)))
    assert found.request_rate is not None
    assert found.above is not None
    assert found.request_rate <= knee < found.above <= found.request_rate * 1.1 + 1e-9
    assert [run.request_rate for run in runs] == server.rates
    assert math.isinf(server.rates[0])
    assert len(runs) <= 10  # starting near the capacity pays


def test_nothing_holds() -> None:
    _, found = asyncio.run(find_knee(Server(0.0, 8.0).measure, LoadConfig(knee_min_rate=1.0)))
    assert found.request_rate is None
    assert found.above == 1.0
    assert "lowest rate" in found.reason


def test_everything_holds() -> None:
    _, found = asyncio.run(find_knee(Server(1e9, 80.0).measure, LoadConfig(knee_max_rate=64.0)))
    assert found.request_rate == 64.0
    assert found.above is None
    assert "highest rate" in found.reason


def test_runs_are_limited() -> None:
    runs, found = asyncio.run(find_knee(Server(40.0, 1e6).measure, LoadConfig(knee_max_runs=3)))
    assert len(runs) == 3
    assert "3 runs" in found.reason


def test_holds() -> None:
    assert holds(metrics(), 0.9)
    assert not holds(metrics(attained=0.89), 0.9)
    assert not holds(metrics(met=False), 0.9)
    assert not holds(metrics(completed=80, failed=20), 0.9)
    assert not holds(metrics(completed=0), 0.9)
    assert holds(metrics(attained=None), 0.9)


def test_a_server_that_falls_behind_does_not_hold() -> None:
    """A queue served at 5/s, each request 0.5 s on its own, 100 sent at a constant rate: offline arithmetic."""

    def run(rate: float) -> dict[str, Any]:
        free, e2els = 0.0, []
        for i in range(100):
            sent = i / rate
            free = max(free, sent) + 0.2
            e2els.append(free - sent + 0.3)
        return metrics() | {"duration": 99 / rate + e2els[-1], "e2els": e2els}

    assert holds(run(4.5), 0.9, 4.5)
    assert not holds(run(6.0), 0.9, 6.0)
    assert not holds(run(10.0), 0.9, 10.0)
    assert holds(run(10.0), 0.9)  # all objectives alone would say yes
    # Shorter than one request's own time: the tail is no sign of a queue.
    assert holds(metrics() | {"duration": 2.1, "e2els": [2.0] * 100}, 0.9, 100.0)


def test_sweep_measures_each_rate_once_in_order() -> None:
    server = Server(1.0, 9.0)
    runs = asyncio.run(sweep(server.measure, (4.0, 1.0, 2.0)))
    assert [r.request_rate for r in runs] == server.rates == pytest.approx([4.0, 1.0, 2.0])
