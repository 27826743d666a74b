"""The load generator: sends requests at their moments, keeps within a concurrency, measures itself.

Open loop: a request is sent at its offset whatever the server does. Closed loop: `max_concurrency` requests
are always under way. Both together: a request is sent at its offset or when a place is free, whichever is
later, and its time starts when it is sent.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmtool.bench.backend import Backend
from llmtool.bench.probe import ClientLoad, LoopProbe
from llmtool.workload.metrics import RequestRecord, latencies_ms
from llmtool.workload.requests import BenchRequest

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, handed to the progress callback after every request. phase: what is running, in
    words.
    """

    phase: str
    done: int
    failed: int
    total: int
    running: int
    elapsed: float


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """records: of the requests sent, in order; their `start` after the first of them. duration: seconds from
    the first request sent to the last stream ended."""

    records: list[RequestRecord]
    duration: float
    client: ClientLoad


async def run_load(
    backend: Backend,
    requests: Sequence[BenchRequest],
    offsets: Sequence[float] | np.ndarray,
    max_concurrency: int | None = None,
    duration: float | None = None,
    progress: ProgressCallback | None = None,
    phase: str = "bench",
) -> LoadOutcome:
    """Sends `requests` at `offsets` (seconds, ascending) and waits for all that were sent.

    Requests that fail are in the records; an exception out of the backend is a bug and ends the run.
    """
    assert len(requests) == len(offsets)
    run = _Run(backend, len(requests), max_concurrency, progress, phase)
    async with LoopProbe() as probe:
        with _quiet_collector():
            await run.dispatch(requests, [float(o) for o in offsets], duration)
    records = run.records
    origin = min((r.start for r in records), default=run.origin)
    span = max((r.start + r.e2e for r in records), default=origin) - origin
    for record in records:
        record.start -= origin
    values = latencies_ms(records)
    medians = [float(np.median(values[name])) if values[name] else None for name in ("itl", "ttft")]
    return LoadOutcome(records, span, probe.judge(run.send_lags, medians[0], medians[1]))


class _Run:
    """State of one run."""

    def __init__(
        self, backend: Backend, total: int, limit: int | None, progress: ProgressCallback | None, phase: str
    ) -> None:
        self._backend = backend
        self._total = total
        self._gate = asyncio.Semaphore(limit) if limit else None
        self._progress = progress
        self._phase = phase
        self._done = self._failed = self._running = 0
        self.records: list[RequestRecord] = []
        self.send_lags: list[float] = []
        self.origin = time.perf_counter()

    async def dispatch(
        self, requests: Sequence[BenchRequest], offsets: list[float], duration: float | None
    ) -> None:
        self.origin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for index, (request, offset) in enumerate(zip(requests, offsets, strict=True)):
                if duration is not None and offset > duration:
                    break
                if self._gate is not None:
                    await self._gate.acquire()
                now = time.perf_counter()
                due = max(self.origin + offset, now)
                if duration is not None and due > self.origin + duration:
                    break
                if due > now:
                    await asyncio.sleep(due - now)
                record = RequestRecord(index=index, max_tokens=request.max_tokens)
                self.records.append(record)
                self._running += 1
                tasks.create_task(self._one(request, record, due if due > now else None))

    async def _one(self, request: BenchRequest, record: RequestRecord, due: float | None) -> None:
        await self._backend.generate(request, record)
        if due is not None:  # one that was sent at once had no moment of its own to miss
            self.send_lags.append(max(0.0, record.start - due))
        self._running -= 1
        self._done += record.success
        self._failed += not record.success
        if self._gate is not None:
            self._gate.release()
        if self._progress is not None:
            elapsed = time.perf_counter() - self.origin
            self._progress(
                Progress(self._phase, self._done, self._failed, self._total, self._running, elapsed)
            )


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """What exists already (datasets of millions of ints) is not worth a collector's pause in
    mid-measurement.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
