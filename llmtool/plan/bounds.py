"""What a plan cannot do better than, whatever is scheduled: bounds from its step costs, without a simulation.

Sound for the cost model, not only likely: a step of m tokens takes at least the least that any step of m or more
tokens takes without attention, so
  - a sequence's decode step, and each chunk of its prompt, takes at least the cheapest step;
  - P prompt and O output tokens take at least (P + O) * min over m of step(m) / m, and O * min over n of step(n)
  / n
    with n at most the sequences that can run;
  - a run lasts as long as its busiest engine, and until the last request has come and been served.
With speculation a step may bring 1 + depth tokens of a sequence, and has as many of it. Attention is left out of
all of them. Tests hold every bound against simulations.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtool.sim.deployment import Deployment
from llmtool.sim.memory import DeviceMemory
from llmtool.sim.stepcost import TOKENS, PlanCost, _interpolate
from llmtool.sim.workload import Workload
from llmtool.workload.slo import SLO

_SAFETY = 1 - 1e-9  # bounds and simulations round differently


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds: ttft, e2e per request in seconds [n]; tpot in seconds; duration of the run."""

    ttft: NDArray[np.float64]
    e2e: NDArray[np.float64]
    tpot: float
    duration: float

    def misses(self, slos: Sequence[SLO]) -> str:
        """The percentile SLO that no schedule of this plan can meet, as a sentence; ""."""
        values = {"ttft": self.ttft, "e2el": self.e2e, "tpot": np.array([self.tpot])}
        for slo in slos:
            if slo.percentile is not None and slo.metric in values:
                least = float(np.percentile(values[slo.metric], slo.percentile)) * 1000
                if least > slo.limit_ms:
                    return f"{slo} cannot be met: at least {least:.1f} ms"
        return ""


def bounds_of(cost: PlanCost, deployment: Deployment, memory: DeviceMemory, workload: Workload) -> Bounds:
    d, plan, engine = deployment, deployment.plan, deployment.engine
    budget = max(d.budget, d.max_seqs)
    stages = [cost._linear[i] for i in range(plan.pp)]
    whole = [sum(values) for values in zip(*stages, strict=True)]
    # In a pipeline steps overlap: what bounds the rate is the slowest stage.
    interval = whole if plan.pp == 1 else [max(values) for values in zip(*stages, strict=True)]
    host = engine.host_step if plan.pp == 1 else 0.0
    shortest = min(row.input_len for row in workload.rows)
    burst = 1 + (d.drafting.depth if d.drafting else 0)  # tokens of a sequence in a step
    seats = max(1, min(d.max_seqs * burst, memory.tokens // max(1, shortest) * burst, budget))
    least_step = _least_from(whole, 1.0, budget) + engine.host_step
    per_token = min((_least_from(interval, m, budget) + host) / m for m in _points(budget))
    per_output = min((_least_from(interval, n, budget) + host) / n for n in _points(seats))
    inputs = np.array([row.input_len for row in workload.rows], dtype=np.float64)
    outputs = np.array([row.output_len for row in workload.rows], dtype=np.float64)
    fresh = np.ones_like(inputs) if d.prefix_caching else inputs  # a cached prompt is one token to compute
    chunks = np.ceil(fresh / budget)
    # A prompt's chunks follow each other through a pipeline before the first one is out of it.
    least_interval = _least_from(interval, 1.0, budget) + host
    ttft = np.maximum(least_step + (chunks - 1) * least_interval, fresh * per_token) + engine.request
    e2e = ttft + np.ceil(np.maximum(0.0, outputs - 1) / burst) * least_step
    groups = plan.dp * plan.attention_dp
    decodes = float(np.maximum(0.0, outputs - 1).sum())
    busy = max((float(fresh.sum()) + decodes) * per_token, decodes * per_output) / groups
    arrivals = np.array([row.arrival or 0.0 for row in workload.rows])
    served = (
        float((arrivals + e2e - engine.request).max()) if workload.concurrency is None else float(e2e.max())
    )
    longest = served - (float(arrivals.min()) if workload.concurrency is None else engine.request)
    return Bounds(ttft * _SAFETY, e2e * _SAFETY, least_step / burst * _SAFETY, max(busy, longest) * _SAFETY)


def _points(limit: int) -> list[int]:
    return [m for m in TOKENS if m < limit] + [limit]


def _least_from(values: Sequence[float], m: float, budget: int) -> float:
    """The least of a piecewise linear curve over [m, budget]: at a knot or at an end."""
    low, high = bisect_right(TOKENS, m), bisect_right(TOKENS, budget)
    ends = (_interpolate(TOKENS, values, m), _interpolate(TOKENS, values, budget))
    return min(*ends, *values[low:high])
