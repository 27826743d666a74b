"""The load generator with a backend whose behaviour is scripted, so that what is asserted is not a matter of
speed.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from llmtool.bench.load import Progress, run_load
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest

REQUESTS = [BenchRequest(text=f"r{i}", max_tokens=1) for i in range(12)]


class Scripted:
    """Takes `seconds` for a request; fails those in `failing`; remembers who ran beside whom."""

    description = "scripted"

    def __init__(self, seconds: float = 0.0, failing: frozenset[str] = frozenset()) -> None:
        self.seconds = seconds
        self.failing = failing
        self.order: list[str] = []
        self.running = self.peak = self.cancelled = 0

    async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
        assert request.text is not None
        record.start = time.perf_counter()
        self.order.append(request.text)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        record.success = request.text not in self.failing
        record.error = "" if record.success else "scripted"
        record.e2e = time.perf_counter() - record.start

    async def counters(self) -> dict[str, float]:
        return {}

    async def speculation(self) -> dict[str, object]:
        return {}

    async def memory(self) -> dict[str, int]:
        return {}

    async def close(self) -> None:
        pass


def test_closed_loop_keeps_the_concurrency_and_the_order() -> None:
    backend = Scripted(0.01)
    outcome = asyncio.run(run_load(backend, REQUESTS, [0.0] * 12, max_concurrency=3))
    assert backend.peak == 3
    assert backend.order == [f"r{i}" for i in range(12)]
    assert [r.index for r in outcome.records] == list(range(12))


def test_open_loop_does_not_wait_for_answers() -> None:
    class Patient(Scripted):
        """Answers nobody until everybody has asked."""

        async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
            self.peak += 1
            while self.peak < len(REQUESTS):
                await asyncio.sleep(0.001)
            record.start, record.success = time.perf_counter(), True

    outcome = asyncio.run(run_load(Patient(), REQUESTS, [0.001 * i for i in range(12)]))
    assert len(outcome.records) == 12


def test_requests_are_never_early_and_times_start_with_the_first() -> None:
    offsets = [0.0, 0.03, 0.05, 0.1]
    sent: list[float] = []

    class Noting(Scripted):
        async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
            await super().generate(request, record)
            sent.append(record.start)

    before = time.perf_counter()
    outcome = asyncio.run(run_load(Noting(), REQUESTS[:4], offsets))
    assert all(at >= before + offset for at, offset in zip(sent, offsets, strict=True))
    assert [r.start for r in outcome.records] == pytest.approx([at - sent[0] for at in sent])
    assert outcome.duration == pytest.approx(max(r.start + r.e2e for r in outcome.records))


def test_duration_stops_sending_but_not_what_runs() -> None:
    backend = Scripted(0.15)
    outcome = asyncio.run(run_load(backend, REQUESTS, [0.05 * i for i in range(12)], duration=0.12))
    assert backend.order == ["r0", "r1", "r2"][: len(backend.order)]  # a slow machine may miss the last
    assert all(r.success for r in outcome.records)
    closed = Scripted(0.05)
    outcome = asyncio.run(run_load(closed, REQUESTS, [0.0] * 12, max_concurrency=1, duration=0.12))
    assert 1 <= len(outcome.records) <= 3


def test_failures_are_counted_in_the_progress() -> None:
    seen: list[Progress] = []
    backend = Scripted(failing=frozenset({"r1", "r5"}))
    asyncio.run(run_load(backend, REQUESTS, [0.0] * 12, progress=seen.append, phase="x"))
    assert len(seen) == 12
    last = seen[-1]
    assert (last.phase, last.done, last.failed, last.total, last.running) == ("x", 10, 2, 12, 0)


def test_a_bug_in_the_backend_ends_the_run_loudly() -> None:
    class Broken(Scripted):
        async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
            if request.text == "r2":
                raise ZeroDivisionError
            await super().generate(request, record)

    backend = Broken(30.0)
    with pytest.raises(ExceptionGroup) as group:
        asyncio.run(run_load(backend, REQUESTS, [0.0] * 12))
    assert group.group_contains(ZeroDivisionError)
    assert backend.running == 0


def test_cancelling_the_run_cancels_every_request() -> None:
    backend = Scripted(30.0)

    async def main() -> None:
        task = asyncio.create_task(run_load(backend, REQUESTS, [0.0] * 12))
        while backend.running < 12:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert backend.cancelled == 12


def test_a_client_that_is_busy_says_so() -> None:
    class Hog(Scripted):
        async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
            await super().generate(request, record)
            until = time.thread_time() + 0.06
            while time.thread_time() < until:
                pass

    outcome = asyncio.run(run_load(Hog(), REQUESTS, [0.01 * i for i in range(12)]))
    assert outcome.client.is_bottleneck
    assert outcome.client.loop_lag_max_ms > 20
    assert any("late" in w or "bottleneck" in w for w in outcome.client.warnings)
