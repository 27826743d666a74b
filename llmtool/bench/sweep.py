"""Several runs at several rates: a sweep over given ones, and the search for the knee.

The knee is the highest request rate at which the objectives still hold. Every decision rests on a measured
run; the search brackets the knee and then bisects on a logarithmic scale.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmtool.bench.config import LoadConfig
from llmtool.bench.result import RunResult

Measure = Callable[[float], Awaitable[RunResult]]
KEPT_UP = 0.9  # of the offered rate: completing less than this is falling behind
SPANS = 3  # requests should come for as long as so many of them take
FIRST_SHARE = 0.75  # of the capacity: where the search starts
UP, DOWN = 1.5, 0.5


@dataclass(frozen=True, slots=True)
class Knee:
    """request_rate: the highest rate measured that holds, None if none did. above: the lowest that does not,
    None if none failed. capacity: requests/s completed when all were sent at once. reason: why the search
    ended.
    """

    request_rate: float | None
    above: float | None
    capacity: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def achieved_rate(metrics: Mapping[str, Any]) -> float:
    """Requests/s completed, without the run's tail: a server that keeps up still needs the last request's own time
    after it was sent. That time is taken from the first quarter of the requests, before a queue can have built up.
    """
    duration, e2els = metrics.get("duration") or 0.0, metrics.get("e2els") or []
    early = [e for e in e2els[: max(1, len(e2els) // 4)] if e > 0]
    own = statistics.median(early) if early else 0.0
    # All sent and answered within one request's own time: nothing fell behind.
    return float(metrics["completed"] / (duration - own)) if duration > own else math.inf


def holds(metrics: Mapping[str, Any], slo_attainment: float, rate: float = math.inf) -> bool:
    """Enough requests meet every per-request SLO, every percentile SLO is met, few enough fail, and the server
    keeps up with `rate` requests/s (a short run can meet every objective while a queue builds up)."""
    if math.isfinite(rate) and achieved_rate(metrics) < KEPT_UP * rate:
        return False
    total = metrics["completed"] + metrics["failed"]
    if not total or metrics["completed"] < slo_attainment * total:
        return False
    attained = metrics["slo_attainment"]
    if attained is not None and attained < slo_attainment:
        return False
    return all(slo["met"] for slo in metrics["slos"] if "met" in slo)


def too_short(metrics: Mapping[str, Any], rate: float) -> str | None:
    """A sentence where the requests of a run all came within the time that few of them take: whether a server keeps
    up with a rate shows once early requests have ended and later ones still come.
    """
    sent, typical = metrics["completed"] + metrics["failed"], (metrics.get("median_e2el_ms") or 0.0) / 1000
    if not math.isfinite(rate) or sent >= SPANS * rate * typical:
        return None
    enough = math.ceil(2 * SPANS * rate * typical)
    return (
        f"The {sent} requests at {rate:.3g}/s came within {sent / rate:.2g} s, and one takes {typical:.2g} s: too "
        f"few to tell whether the server keeps up. Give --num-prompts {enough} or more."
    )


async def sweep(measure: Measure, rates: tuple[float, ...]) -> list[RunResult]:
    return [await measure(rate) for rate in rates]


async def find_knee(measure: Measure, load: LoadConfig) -> tuple[list[RunResult], Knee]:
    """All runs in the order measured (the first all at once, for the capacity), and the knee.

    Starts at 3/4 of the capacity, which the knee can hardly exceed: most runs then are near the answer, and
    a slow server is not asked to crawl up from the lowest rate.
    """
    runs = [await measure(math.inf)]
    capacity = float(runs[0].metrics["request_throughput"])
    low: float | None = None
    high: float | None = None
    rate = _clip(FIRST_SHARE * capacity, load)
    reason = f"{load.knee_max_runs} runs were made"
    while len(runs) < load.knee_max_runs:
        run = await measure(rate)
        runs.append(run)
        if holds(run.metrics, load.slo_attainment, rate):
            low = rate
        else:
            high = rate
        if low is not None and low >= load.knee_max_rate:
            reason = f"the objectives hold at the highest rate allowed, {low:g}/s"
            break
        if high is not None and high <= load.knee_min_rate:
            reason = f"the objectives are missed at the lowest rate allowed, {high:g}/s"
            break
        if low is not None and high is not None and high <= low * (1 + load.knee_tolerance):
            reason = f"the knee lies between {low:.3g} and {high:.3g} requests/s"
            break
        rate = _next_rate(low, high, load)
    return runs, Knee(low, high, capacity, reason)


def _next_rate(low: float | None, high: float | None, load: LoadConfig) -> float:
    if low is None:
        assert high is not None
        return _clip(high * DOWN, load)
    return _clip(low * UP, load) if high is None else math.sqrt(low * high)


def _clip(rate: float, load: LoadConfig) -> float:
    return min(max(rate, load.knee_min_rate), load.knee_max_rate)
