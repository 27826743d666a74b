"""THE definition of the numbers this project shows: bench, plan and /metrics mean the same by the same name.

For a request sent at time s whose stream brings chunks of output at t_1 < ... < t_m and n output tokens:
  TTFT  t_1 - s: until the first chunk that carries output (a chat stream's bare role chunk carries none)
  ITL   t_i - t_(i-1), one gap per chunk after the first; a chunk of several tokens is one gap
  E2E   t_end - s, t_end the last chunk with output or the one with the finish reason, whichever is later
  TPOT  (E2E - TTFT) / (n - 1), undefined for n < 2
For a run of `duration` seconds, from its first request sent to its last stream ended:
  throughput    completed requests, output tokens, or prompt + output tokens of completed requests, per second
  slo_goodput   requests per second that completed within every per-request SLO (slo.py); a request with
                fewer than two tokens meets any TPOT limit. In result files its key is `request_goodput`
Failed requests count in no latency and no throughput. Statistics are over requests, for ITL over all gaps;
std is the population's, percentiles interpolate linearly (numpy's default), both as in vLLM's benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmtool.workload.slo import SLO
from llmtool.workload.statistics import GroupedSample, mean_interval, quantile_interval

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
LATENCIES = ("ttft", "tpot", "itl", "e2el")


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times in seconds; `start` after the run's start.

    prompt_tokens and output_tokens are the server's own count where `counted`, else the known prompt length
    and the number of chunks. cached_tokens: prompt tokens the server says it took from its prefix cache.
    """

    index: int = 0
    start: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    e2e: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    max_tokens: int | None = None
    success: bool = False
    error: str = ""
    cached_tokens: int | None = None
    counted: bool = False
    finish_reason: str | None = None
    text: str = ""

    @property
    def tpot(self) -> float | None:
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def meets(self, slos: Sequence[SLO]) -> bool:
        """Completed, and within every per-request SLO; percentile SLOs say nothing about one request."""
        values = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2e}
        return self.success and all(
            values[s.metric] * 1000 <= s.limit_ms for s in slos if s.percentile is None
        )


def latencies_ms(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """All values of each latency over completed requests, in milliseconds and in order of start."""
    done = sorted((r for r in records if r.success), key=lambda r: (r.start, r.index))
    return {
        "ttft": [r.ttft * 1000 for r in done],
        "tpot": [r.tpot * 1000 for r in done if r.tpot is not None],
        "itl": [gap * 1000 for r in done for gap in r.itls],
        "e2el": [r.e2e * 1000 for r in done],
    }


def summarize(
    records: Sequence[RequestRecord],
    duration: float,
    slos: Sequence[SLO] = (),
    percentiles: Sequence[float] = PERCENTILES,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The run's numbers under the keys of vLLM's result file, then ours.

    Statistics are None where nothing was measured. seed: of the bootstrap behind `confidence_intervals`,
    which holds [low, high] under the keys of the means and medians. `cached_tokens` is None unless the
    server reports it.
    """
    ordered = sorted(records, key=lambda r: r.index)
    done = [r for r in ordered if r.success]
    tokens_in, tokens_out = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    per_request = [s for s in slos if s.percentile is None]
    good = sum(r.meets(per_request) for r in done)

    def per_second(count: float) -> float:
        return count / duration if duration > 0 else 0.0

    values = latencies_ms(records)
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(ordered) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": per_second(len(done)),
        "request_goodput": per_second(good) if per_request else None,
        "output_throughput": per_second(tokens_out),
        "total_token_throughput": per_second(tokens_in + tokens_out),
        "input_lens": [r.prompt_tokens for r in ordered],
        "output_lens": [r.output_tokens for r in ordered],
        "ttfts": [r.ttft for r in ordered],
        "itls": [r.itls for r in ordered],
        "errors": [r.error for r in ordered],
        **_statistics(values, percentiles),
        "max_concurrent_requests": peak_concurrency(ordered),
        "start_times": [r.start for r in ordered],
        "e2els": [r.e2e for r in ordered],
        "cached_tokens": _cached(done),
        "slo_attainment": good / len(ordered) if per_request and ordered else None,
        "slos": [judge(slo, ordered, values) for slo in slos],
        "confidence": confidence,
        "confidence_intervals": _intervals(records, values, seed, confidence),
    }


def _statistics(values: dict[str, list[float]], percentiles: Sequence[float]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name in LATENCIES:
        x = np.asarray(values[name], dtype=np.float64)
        named: list[tuple[str, Callable[[Any], Any]]] = [
            ("mean", np.mean),
            ("median", np.median),
            ("std", np.std),
        ]
        out |= {f"{word}_{name}_ms": float(f(x)) if len(x) else None for word, f in named}
        for p in percentiles:
            out[f"p{p:g}_{name}_ms"] = float(np.percentile(x, p)) if len(x) else None
    return out


def _intervals(
    records: Sequence[RequestRecord], values: dict[str, list[float]], seed: int, confidence: float
) -> dict[str, list[float] | None]:
    rng = np.random.default_rng(seed)
    out: dict[str, tuple[float, float] | None] = {}
    for name in ("ttft", "tpot", "e2el"):
        out[f"mean_{name}_ms"] = mean_interval(values[name], rng, confidence)
        out[f"median_{name}_ms"] = quantile_interval(values[name], 0.5, rng, confidence)
    done = sorted((r for r in records if r.success), key=lambda r: (r.start, r.index))
    gaps = GroupedSample([[gap * 1000 for gap in r.itls] for r in done])
    out["mean_itl_ms"], out["median_itl_ms"] = gaps.intervals(rng, confidence)
    return {key: list(interval) if interval else None for key, interval in out.items()}


def judge(slo: SLO, records: Sequence[RequestRecord], values: dict[str, list[float]]) -> dict[str, Any]:
    """One SLO against a run. Per request: `attained` is the share of all requests within it, failures
    included. On a percentile: `measured_ms` and whether it is `met`; a run in which nothing completed meets
    none.
    """
    if slo.percentile is None:
        attained = sum(r.meets([slo]) for r in records) / len(records) if records else 0.0
        return {"slo": str(slo), "attained": attained}
    x = values[slo.metric]
    measured = float(np.percentile(x, slo.percentile)) if x else None
    # A stream of one token has no gap: with no gap anywhere, limits on gaps hold wherever requests completed.
    met = (
        measured <= slo.limit_ms
        if measured is not None
        else slo.metric in ("itl", "tpot") and bool(values["ttft"])
    )
    return {"slo": str(slo), "measured_ms": measured, "met": met}


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Most requests under way at one moment; one that ends when another starts does not overlap it."""
    return max((count for _, count in concurrency_steps(records)), default=0)


def concurrency_steps(records: Sequence[RequestRecord]) -> list[tuple[float, int]]:
    """(time, requests under way from then on), one entry per change, for timelines."""
    events: dict[float, int] = {}
    for r in records:
        if r.e2e > 0:
            events[r.start] = events.get(r.start, 0) + 1
            events[r.start + r.e2e] = events.get(r.start + r.e2e, 0) - 1
    running, steps = 0, []
    for moment in sorted(events):
        running += events[moment]
        steps.append((moment, running))
    return steps


def _cached(done: Sequence[RequestRecord]) -> int | None:
    reported = [r.cached_tokens for r in done if r.cached_tokens is not None]
    return sum(reported) if reported else None
