"""Results made of numbers instead of runs: what went in is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmtool.bench.probe import judge_client
from llmtool.bench.result import BenchResult, RunResult, make_run
from llmtool.workload.metrics import RequestRecord, summarize
from llmtool.workload.slo import parse_slos


def made_records(
    seed: int, n: int = 120, scale: float = 1.0, prompts: int = 0, gaps: int = 10, rate: float = 10.0
) -> list[RequestRecord]:
    """Poisson arrivals, lognormal latencies times `scale`; `prompts` seeds the prompt lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.random.default_rng(prompts).integers(10, 500, size=n)
    starts = np.cumsum(rng.exponential(1 / rate, size=n))
    records = []
    for i in range(n):
        ttft = scale * float(rng.lognormal(-2, 0.3)) * (1 + lengths[i] / 500)
        itls = (scale * rng.lognormal(-4, 0.2, size=gaps)).tolist()
        e2e = ttft + sum(itls)
        records.append(
            RequestRecord(i, float(starts[i]), ttft, itls, e2e, int(lengths[i]), gaps + 1, success=True)
        )
        records[-1].counted = True
    return records


def made_run(records: list[RequestRecord], rate: float = math.inf, goodput: Sequence[str] = ()) -> RunResult:
    duration = max((r.start + r.e2e for r in records), default=0.0)
    metrics = summarize(records, duration, parse_slos(goodput))
    return make_run(rate, metrics, records, judge_client([], 0.1, [], None, None), {}, False)


def made_result(*runs: RunResult, kind: str | None = None, **changes: Any) -> BenchResult:
    fields: dict[str, Any] = {
        "kind": kind or ("run" if len(runs) == 1 else "sweep"),
        "runs": runs,
        "config": {"num_prompts": 120, "request_rate": "inf"},
        "backend": "http://127.0.0.1:8000",
        "model": "m",
        "seed": 0,
        "date": "2025-01-01T00:00:00+00:00",
        "hardware": {"cpu": "test", "cores": 2},
        "versions": {"python": "3.11"},
    }
    return BenchResult(**fields | changes)
