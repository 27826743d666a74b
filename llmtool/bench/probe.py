"""Was the client itself the limit? Samples the event loop's lag and the thread's CPU share while a run goes
on.

A slow client looks exactly like a slow server: chunks that wait in a socket are timed late. So every run
carries its own evidence, and says so when the numbers are the client's.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PERIOD = 0.01  # seconds between samples
MAX_CPU_SHARE = 0.85
MIN_LAG_MS = 10.0  # below this a lag is the operating system's business
MAX_LAG_SHARE = 0.25  # of the median inter-token gap
MAX_SEND_SHARE = 0.1  # of the median time to first token


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """cpu_share: of one core, by the thread that runs the event loop. lag: how late the loop ran a timer, in
    ms. send_lag: how long after its moment a request was sent, in ms. warnings: sentences, empty when all is
    well.
    """

    cpu_share: float
    loop_lag_p50_ms: float
    loop_lag_p99_ms: float
    loop_lag_max_ms: float
    send_lag_p99_ms: float
    warnings: tuple[str, ...] = ()

    @property
    def is_bottleneck(self) -> bool:
        return bool(self.warnings)

    def as_dict(self) -> dict[str, Any]:
        """Without the warnings: those belong to the run's."""
        figures = asdict(self)
        del figures["warnings"]
        return figures | {"is_bottleneck": self.is_bottleneck}


class LoopProbe:
    """`async with LoopProbe() as probe: ...; probe.judge(...)`, in the loop under watch."""

    def __init__(self, period: float = PERIOD) -> None:
        self._period = period
        self._lags = array("d")  # seconds
        self._cpu = self._wall = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LoopProbe:
        self._cpu, self._wall = time.thread_time(), time.perf_counter()
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._cpu, self._wall = time.thread_time() - self._cpu, time.perf_counter() - self._wall
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + self._period
            await asyncio.sleep(self._period)
            self._lags.append(max(0.0, time.perf_counter() - due))

    def judge(
        self, send_lags: Sequence[float], median_itl_ms: float | None, median_ttft_ms: float | None
    ) -> ClientLoad:
        """After the run; see `judge_client`."""
        share = self._cpu / self._wall if self._wall > 0 else 0.0
        return judge_client(self._lags, share, send_lags, median_itl_ms, median_ttft_ms)


def judge_client(
    loop_lags: Sequence[float],
    cpu_share: float,
    send_lags: Sequence[float],
    median_itl_ms: float | None,
    median_ttft_ms: float | None,
) -> ClientLoad:
    """Whether the client's own delays matter. Lags in seconds; the medians are of what was measured, in ms: a delay
    that would spoil gaps of 20 ms means nothing to gaps of 400 ms.
    """
    lags = np.asarray(loop_lags if len(loop_lags) else [0.0]) * 1000
    p50, p99 = (float(x) for x in np.percentile(lags, (50, 99)))
    send = float(np.percentile(send_lags, 99)) * 1000 if len(send_lags) else 0.0
    warnings = []
    if cpu_share > MAX_CPU_SHARE:
        warnings.append(f"The client used {cpu_share:.0%} of its core: latencies include its own.")
    if p99 > max(MIN_LAG_MS, MAX_LAG_SHARE * (median_itl_ms or 0.0)):
        warnings.append(
            f"The client's event loop ran up to {p99:.0f} ms late (p99): latencies are too high by as much. "
            "Give the client a core of its own."
        )
    if send > max(MIN_LAG_MS, MAX_SEND_SHARE * (median_ttft_ms or 0.0)):
        warnings.append(f"Requests were sent up to {send:.0f} ms late (p99): the load was not as asked.")
    return ClientLoad(cpu_share, p50, p99, float(lags.max()), send, tuple(warnings))
