"""Capacity search: the highest load that a plan carries within the SLOs, by bisection over simulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmtool.errors import UsageError
from llmtool.sim.simulate import SimResult
from llmtool.sim.workload import Workload
from llmtool.workload.slo import SLO

ATTAINED = 0.9  # of the requests must meet per-request SLOs (DistServe, 2401.09670, section 2.3)
PRECISION = 1.02


@dataclass(frozen=True, slots=True)
class Capacity:
    """rate: requests per second (or clients, of a closed loop) held; next_rate: the lowest seen to fail."""

    rate: float
    next_rate: float
    result: SimResult


def holds(result: SimResult, slos: Sequence[SLO]) -> bool:
    per_request = [s for s in slos if s.percentile is None]
    attained = sum(r.meets(per_request) for r in result.records) / len(result.records)
    return result.meets(slos) and attained >= ATTAINED


def capacity(
    run: Callable[[Workload], SimResult], workload: Workload, slos: Sequence[SLO], limit: float = 4096.0
) -> Capacity | None:
    """The load scaled up or down until the SLOs just hold; None where they do not at a 4096th of it.

    Raises UsageError without an SLO: any load is then carried, late.
    """
    if not slos:
        raise UsageError(
            "A capacity search needs objectives.", "Give for example --slo ttft:p99:500 --slo tpot:p99:50."
        )
    base = float(workload.concurrency or workload.rate or 1.0)
    low, good = 0.0, None
    high = 1.0
    result = run(workload)
    if holds(result, slos):
        low, good = 1.0, result
        while high < limit:
            high *= 2
            result = run(workload.faster(high))
            if not holds(result, slos):
                break
            low, good = high, result
        else:
            return Capacity(base * low, float("inf"), good)
    else:
        low = 1.0
        while low > 1 / limit:
            high, low = low, low / 2
            result = run(workload.faster(low))
            if holds(result, slos):
                good = result
                break
    if good is None:
        return None
    while high / low > PRECISION:
        middle = (low * high) ** 0.5
        result = run(workload.faster(middle))
        if holds(result, slos):
            low, good = middle, result
        else:
            high = middle
        if workload.concurrency is not None and base * (high - low) < 1:
            break
    return Capacity(base * low, base * high, good)
