"""A against B: for every metric the ratio B / A, its interval, and whether the difference is more than noise.

Intervals come from resampling the requests of both runs (workload/statistics.py: blocks of neighbours). Where both
ran the same requests in the same order, the same ones are drawn from both (a paired comparison): the prompts' own
variety then cancels. Throughputs are resampled over slices of the run's time. All of it is noise within one run;
what changes from run to run (other tenants, clocks, placement) needs repeated runs, and no file can show it. A
comparison tests a dozen metrics at once, so verdicts are corrected for their number (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from llmtool.bench.result import BenchResult, RunResult
from llmtool.errors import UsageError
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.slo import parse_slos
from llmtool.workload.statistics import (
    Floats,
    GroupedSample,
    block_indices,
    block_length,
    chunk_rows,
)

RESAMPLES = 1000
MAX_SLICES = 50
AT_ONCE = 0.05  # of the run: everything was sent in its first twentieth
MIN_SAMPLES = 5
MIN_P99_SAMPLES = 500  # the p99 of fewer values rests on less than five of them
# Smaller differences are not called better or worse even where they are beyond noise.
MIN_EFFECT = 0.01
HIT_RATE_DIFFERENCE = 0.05
EQUIVALENCE = 0.05  # "same": the whole interval lies within +-5 %
Weigh = Callable[[RequestRecord], float]
STATISTICS: tuple[tuple[str, Callable[[Floats], Floats]], ...] = (
    ("mean", lambda v: np.mean(v, axis=-1)),
    ("median", lambda v: np.median(v, axis=-1)),
    ("p99", lambda v: np.percentile(v, 99, axis=-1)),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric. a, b: its values. ratio: b / a. low, high: interval of the ratio, None where it has none.
    p_value: two-sided, of ratio 1, before the correction for the number of metrics.

    verdict: better | worse (B than A), beyond noise; same, the interval lies within EQUIVALENCE; unclear, neither
    can be told; unknown, too little was measured for an interval.
    """

    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    p_value: float | None
    higher_is_better: bool
    verdict: str


@dataclass(frozen=True, slots=True)
class Sample:
    """ratios: B / A of resamples [RESAMPLES]. size: values (or groups of them) resampled on the smaller side."""

    ratios: Floats
    size: int


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs. request_rate: the rate both had, or None where they differ. paired: same requests on both sides."""

    request_rate: float | None
    paired: bool
    metrics: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class CompareResult:
    """differences: settings that differ, as {name: [a, b]}: what the ratio may be due to. notes: sentences."""

    a: str
    b: str
    confidence: float
    runs: tuple[RunComparison, ...]
    differences: dict[str, list[Any]]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        out = asdict(self)
        for run in out["runs"]:
            rate = run["request_rate"]
            run["request_rate"] = "inf" if rate is not None and math.isinf(rate) else rate
        return out


def compare(
    a: BenchResult,
    b: BenchResult,
    confidence: float = 0.95,
    seed: int = 0,
    min_effect: float = MIN_EFFECT,
) -> CompareResult:
    """Compares run with run: of sweeps those at equal rates. UsageError when the files have no rate in common."""
    if not 0.5 < confidence < 1:
        raise UsageError(f"The confidence must be between 0.5 and 1, not {confidence:g}.")
    pairs = _pairs(a, b)
    rng = np.random.default_rng(seed)
    runs = tuple(_compare_runs(left, right, confidence, rng, min_effect) for left, right in pairs)
    return CompareResult(
        a=a.label or a.backend or "A",
        b=b.label or b.backend or "B",
        confidence=confidence,
        runs=runs,
        differences=_differences(a, b),
        notes=tuple(_notes(a, b, runs)),
    )


def _pairs(a: BenchResult, b: BenchResult) -> list[tuple[RunResult, RunResult]]:
    if len(a.runs) == len(b.runs) == 1:
        return [(a.runs[0], b.runs[0])]
    by_rate = {run.request_rate: run for run in b.runs}
    pairs = [(run, by_rate[run.request_rate]) for run in a.runs if run.request_rate in by_rate]
    if not pairs:
        raise UsageError("The two results have no request rate in common.", "Sweep both over the same rates.")
    return pairs


def _compare_runs(
    a: RunResult, b: RunResult, confidence: float, rng: np.random.Generator, min_effect: float
) -> RunComparison:
    left, right = a.records(), b.records()
    paired = len(left) == len(right) and all(
        x.prompt_tokens == y.prompt_tokens and x.success and y.success
        for x, y in zip(left, right, strict=True)
    )
    metrics: list[Comparison] = []

    def add(name: str, a_value: Any, b_value: Any, sample: Sample | None, higher: bool) -> None:
        if a_value is not None and b_value is not None:
            metrics.append(_estimate(name, a_value, b_value, sample, higher, confidence))

    for name, weigh in _throughputs(a, b):
        ratios = _throughput_ratios(left, right, name, weigh, rng)
        add(name, a.metrics.get(name), b.metrics.get(name), ratios, True)
    for latency in ("ttft", "tpot", "e2el"):
        pair = _Samples(_values(left, latency), _values(right, latency), paired)
        for word, statistic in STATISTICS:
            key = f"{word}_{latency}_ms"
            least = MIN_P99_SAMPLES if word == "p99" else MIN_SAMPLES
            add(key, a.metrics.get(key), b.metrics.get(key), pair.ratios(statistic, rng, least), False)
    for word, ratios in _gap_ratios(left, right, paired, rng):
        key = f"{word}_itl_ms"
        add(key, a.metrics.get(key), b.metrics.get(key), ratios, False)
    rate = a.request_rate if a.request_rate == b.request_rate else None
    return RunComparison(rate, paired, tuple(_judge(metrics, confidence, min_effect)))


def _estimate(
    name: str,
    a: float | None,
    b: float | None,
    sample: Sample | None,
    higher_is_better: bool,
    confidence: float,
) -> Comparison:
    """Student's t on the bootstrap's standard error of log(B / A), with one degree of freedom less than the blocks
    of the smaller run: percentiles of so few blocks would be too narrow, and have no tail to correct with."""
    ratio = b / a if a and b is not None else None
    ratios = sample.ratios[np.isfinite(sample.ratios) & (sample.ratios > 0)] if sample is not None else None
    if not ratio or sample is None or ratios is None or len(ratios) < 100:
        return Comparison(name, a, b, ratio, None, None, None, higher_is_better, "unknown")
    error = float(np.log(ratios).std()) * math.sqrt(sample.size / (sample.size - 1))
    freedom = max(1, -(-sample.size // _block(sample.size)) - 1)
    half = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
    low, high = ratio * math.exp(-half), ratio * math.exp(half)
    if error > 0:
        p_value = 2 * float(stdtr(freedom, -abs(math.log(ratio)) / error))
    else:
        p_value = float(ratio == 1)
    return Comparison(name, a, b, ratio, low, high, p_value, higher_is_better, "unclear")


def _judge(metrics: Sequence[Comparison], confidence: float, min_effect: float) -> Iterator[Comparison]:
    """Verdicts under Holm's correction: the chance that any difference is claimed where there is none stays below
    1 - confidence, however many metrics are compared."""
    tested = sorted((c for c in metrics if c.p_value is not None), key=lambda c: c.p_value or 0.0)
    found: set[str] = set()
    for rank, c in enumerate(tested):
        if (c.p_value or 0.0) > (1 - confidence) / (len(tested) - rank):
            break
        found.add(c.metric)
    for c in metrics:
        if c.ratio is None or c.low is None or c.high is None:
            yield c
        elif c.metric in found and abs(c.ratio - 1) >= min_effect:
            yield replace(c, verdict="better" if (c.ratio > 1) == c.higher_is_better else "worse")
        elif c.low >= 1 - EQUIVALENCE and c.high <= 1 + EQUIVALENCE:
            yield replace(c, verdict="same")
        else:
            yield c


def _values(records: Sequence[RequestRecord], latency: str) -> Floats:
    """A latency per request, in order of start, NaN where a request has none; scale does not matter to ratios."""
    ordered = sorted((r for r in records if r.success), key=lambda r: r.index)
    read: dict[str, Callable[[RequestRecord], float | None]] = {
        "ttft": lambda r: r.ttft,
        "tpot": lambda r: r.tpot,
        "e2el": lambda r: r.e2e,
    }
    values = [read[latency](r) for r in ordered]
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


class _Samples:
    """The values of both runs, and resamples of a statistic's ratio."""

    def __init__(self, a: Floats, b: Floats, paired: bool) -> None:
        if paired:  # drop a request from both where one side has no value
            keep = ~(np.isnan(a) | np.isnan(b))
            a, b = a[keep], b[keep]
        self._a, self._b, self._paired = a[~np.isnan(a)], b[~np.isnan(b)], paired

    def ratios(
        self, statistic: Callable[[Floats], Floats], rng: np.random.Generator, least: int
    ) -> Sample | None:
        size = min(len(self._a), len(self._b))
        if size < least:
            return None
        pieces = _draws(len(self._a), len(self._b), self._paired, rng)
        ratios = [_ratio(statistic(self._a[i]), statistic(self._b[j])) for i, j in pieces]
        return Sample(np.concatenate(ratios), size)


def _gap_ratios(
    left: Sequence[RequestRecord], right: Sequence[RequestRecord], paired: bool, rng: np.random.Generator
) -> Iterator[tuple[str, Sample | None]]:
    a, b = (GroupedSample([r.itls for r in side if r.success]) for side in (left, right))
    if min(a.num_groups, b.num_groups) < MIN_SAMPLES or not (len(a.values) and len(b.values)):
        yield "mean", None
        yield "median", None
        return
    # Each resample walks through all gaps: fewer of them for long runs.
    count = int(np.clip(10_000_000 // (len(a.values) + len(b.values)), 100, RESAMPLES))
    draws = list(_draws(a.num_groups, b.num_groups, paired, rng, count))
    size = min(a.num_groups, b.num_groups)
    means = [_ratio(a.mean(i), b.mean(j)) for i, j in draws]
    medians = [_ratio(a.quantile(i, 0.5), b.quantile(j, 0.5)) for i, j in draws]
    yield "mean", Sample(np.concatenate(means), size)
    yield "median", Sample(np.concatenate(medians), size)


def _block(n: int) -> int:
    """Requests per block. A queue ties together more than n^(1/3) neighbours, which would be false alarms."""
    return min(n, 2 * block_length(n))


def _draws(
    n_a: int, n_b: int, paired: bool, rng: np.random.Generator, count: int = RESAMPLES
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Index arrays [some, n_a] and [some, n_b] of resamples, the same ones where paired."""
    while count > 0:
        rows = min(count, chunk_rows(max(n_a, n_b)))
        (a,) = block_indices(n_a, rows, rng, _block(n_a))
        (b,) = (a,) if paired else block_indices(n_b, rows, rng, _block(n_b))
        yield a, b
        count -= rows


def _throughputs(a: RunResult, b: RunResult) -> Iterator[tuple[str, Weigh]]:
    """Each throughput and what one completed request adds to it; goodput only under the same objectives."""
    yield "request_throughput", lambda r: 1.0
    yield "output_throughput", lambda r: r.output_tokens
    yield "total_token_throughput", lambda r: r.prompt_tokens + r.output_tokens
    left, right = ([str(slo["slo"]) for slo in run.metrics.get("slos") or ()] for run in (a, b))
    if left == right:
        slos = parse_slos(left)
        yield "request_goodput", lambda r: float(r.meets(slos))


def _throughput_ratios(
    left: Sequence[RequestRecord],
    right: Sequence[RequestRecord],
    name: str,
    weigh: Weigh,
    rng: np.random.Generator,
) -> Sample | None:
    # Sent all at once, a run is one burst that drains: its slices are no repetitions of anything.
    if _at_once(left) or _at_once(right):
        return None
    spread = name == "output_throughput"
    a, b = (_slices(side, weigh, spread) for side in (left, right))
    if a is None or b is None:
        return None
    (i, j), *_ = _draws(len(a), len(b), False, rng)
    return Sample(_ratio(a[i].mean(axis=1), b[j].mean(axis=1)), min(len(a), len(b)))


def _at_once(records: Sequence[RequestRecord]) -> bool:
    end = max((r.start + r.e2e for r in records), default=0.0)
    return max((r.start for r in records), default=0.0) < AT_ONCE * end


def _slices(records: Sequence[RequestRecord], weigh: Weigh, spread: bool) -> Floats | None:
    """Throughput in equal slices of the run's time, per second. A request counts when it completes, or, `spread`,
    evenly over the moments of its chunks."""
    done = [r for r in records if r.success]
    end = max((r.start + r.e2e for r in records), default=0.0)
    count = min(MAX_SLICES, len(done) // 2)
    if count < MIN_SAMPLES or end <= 0:
        return None
    moments: list[float] = []
    weights: list[float] = []
    for r in done:
        at = [r.start + r.e2e]
        if spread:
            at = (r.start + r.ttft + np.concatenate(([0.0], np.cumsum(r.itls)))).tolist()
        moments += at
        weights += [weigh(r) / len(at)] * len(at)
    totals, _ = np.histogram(moments, bins=count, range=(0.0, end), weights=weights)
    return totals / (end / count)


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(b, a, out=np.full(np.shape(a), np.nan), where=np.asarray(a) > 0)


def _differences(a: BenchResult, b: BenchResult) -> dict[str, list[Any]]:
    left, right = (
        dict(x.config) | dict(x.hardware) | {f"version of {k}": v for k, v in x.versions.items()}
        for x in (a, b)
    )
    names = sorted(left.keys() | right.keys())
    return {n: [left.get(n), right.get(n)] for n in names if left.get(n) != right.get(n) and n != "label"}


def _notes(a: BenchResult, b: BenchResult, runs: Sequence[RunComparison]) -> Iterator[str]:
    for name, side in (("A", a), ("B", b)):
        for warning in side.warnings:
            yield f"{name}: {warning}"
    for left, right in _pairs(a, b):
        hits = [{**r.metrics, **r.server}.get("prefix_cache_hit_rate") or 0.0 for r in (left, right)]
        if abs(hits[0] - hits[1]) > HIT_RATE_DIFFERENCE:
            yield (
                f"The prefix cache hit rates differ: {100 * hits[0]:.1f} % in A, {100 * hits[1]:.1f} % in B. "
                "A run with prompts that the server has seen before measures its cache."
            )
    if not all(run.paired for run in runs):
        yield "The runs had different requests: their variety is part of the noise. Use the same dataset and seed."
    yield "Intervals cover the noise within these runs; repeat both, interleaved, for what changes between runs."
