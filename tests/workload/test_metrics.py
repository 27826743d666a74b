"""The definitions, against values computed by hand and against a slow oracle that shares no code with them."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.workload.metrics import (
    RequestRecord,
    concurrency_steps,
    latencies_ms,
    peak_concurrency,
    summarize,
)
from llmtool.workload.slo import parse_slos


def by_hand() -> list[RequestRecord]:
    """Three requests that completed and one that failed; all figures below follow with pencil and paper."""
    return [
        RequestRecord(0, 0.0, 0.1, [0.1, 0.3], 0.5, 10, 3, success=True, counted=True, cached_tokens=4),
        RequestRecord(1, 0.2, 0.2, [], 0.2, 20, 1, success=True, counted=True, cached_tokens=0),
        RequestRecord(2, 0.4, 0.3, [0.2], 0.6, 30, 4, success=True, counted=True),
        RequestRecord(3, 0.5, 0.0, [], 0.1, 40, 0, success=False, error="HTTP 503"),
    ]


def test_hand_computed_run() -> None:
    m = summarize(by_hand(), duration=2.0, slos=parse_slos(["ttft:200", "tpot:150"]))
    assert (m["completed"], m["failed"]) == (3, 1)
    assert (m["total_input_tokens"], m["total_output_tokens"]) == (60, 8)
    assert m["request_throughput"] == 1.5
    assert m["output_throughput"] == 4.0
    assert m["total_token_throughput"] == 34.0
    assert m["mean_ttft_ms"] == pytest.approx(200.0)
    assert m["median_ttft_ms"] == pytest.approx(200.0)
    assert m["std_ttft_ms"] == pytest.approx(100 * math.sqrt(2 / 3))
    assert m["p90_ttft_ms"] == pytest.approx(280.0)
    # TPOT: (0.5 - 0.1) / 2 = 0.2 and (0.6 - 0.3) / 3 = 0.1; the one-token request has none.
    assert m["mean_tpot_ms"] == pytest.approx(150.0)
    assert m["mean_itl_ms"] == pytest.approx(200.0)
    assert m["median_itl_ms"] == pytest.approx(200.0)
    assert m["mean_e2el_ms"] == pytest.approx(1300 / 3)
    # Within 200 ms and 150 ms: only the second (no TPOT to miss); the third is late, the first slow.
    assert m["request_goodput"] == pytest.approx(0.5)
    assert m["slo_attainment"] == pytest.approx(0.25)
    assert m["cached_tokens"] == 4
    assert m["max_concurrent_requests"] == 2
    assert m["errors"] == ["", "", "", "HTTP 503"]
    assert m["itls"] == [[0.1, 0.3], [], [0.2], []]
    assert m["input_lens"] == [10, 20, 30, 40]


VLLM_KEYS = {
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"),
    *("request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens"),
    *("ttfts", "itls", "errors", "max_concurrent_requests"),
} | {
    f"{word}_{latency}_ms"
    for word in ("mean", "median", "std", "p50", "p90", "p95", "p99")
    for latency in ("ttft", "tpot", "itl", "e2el")
}


def test_keys_are_those_of_vllms_result_file() -> None:
    m = summarize(by_hand(), 2.0)
    assert m.keys() >= VLLM_KEYS
    assert m["request_goodput"] is None  # nobody asked for it
    assert "p99.9_ttft_ms" in summarize(by_hand(), 2.0, percentiles=(99.9,))


def test_percentile_objectives() -> None:
    m = summarize(by_hand(), 2.0, slos=parse_slos(["ttft:p50:200 ttft:p99:250 itl:p90:300"]))
    assert [slo["met"] for slo in m["slos"]] == [True, False, True]
    assert m["slos"][1]["measured_ms"] == pytest.approx(298.0)
    assert m["request_goodput"] is None  # no bound on single requests was given


def test_nothing_completed_is_none_not_zero() -> None:
    m = summarize([by_hand()[3]], 1.0, slos=parse_slos(["ttft:100 ttft:p99:100"]))
    assert m["mean_ttft_ms"] is None
    assert m["p99_e2el_ms"] is None
    assert m["confidence_intervals"]["mean_ttft_ms"] is None
    assert m["request_goodput"] == 0.0
    assert [slo.get("met", slo.get("attained")) for slo in m["slos"]] == [0.0, False]
    assert summarize([], 0.0)["request_throughput"] == 0.0


seconds = st.floats(0.0, 50.0)


@st.composite
def runs(draw: st.DrawFn) -> list[RequestRecord]:
    records = []
    for index in range(draw(st.integers(0, 12))):
        ttft, gaps = draw(seconds), draw(st.lists(seconds, max_size=5))
        success = draw(st.booleans())
        records.append(
            RequestRecord(
                index=index,
                start=draw(seconds),
                ttft=ttft,
                itls=gaps,
                e2e=ttft + sum(gaps) + draw(st.sampled_from([0.0, 0.25])),
                prompt_tokens=draw(st.integers(0, 99)),
                output_tokens=draw(st.integers(0, 9)),
                success=success,
                error="" if success else "failed",
            )
        )
    return records


def percentile(values: list[float], p: float) -> float:
    """Linear interpolation between closest ranks, written out."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * p / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@settings(max_examples=60, deadline=None)
@given(runs(), st.floats(0.1, 100.0), st.integers(1, 10**5), st.integers(1, 10**5))
def test_against_a_brute_force_oracle(
    records: list[RequestRecord], duration: float, ttft_limit: int, tpot_limit: int
) -> None:
    m = summarize(records, duration, parse_slos([f"ttft:{ttft_limit} tpot:{tpot_limit}"]))
    values: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2el": []}
    good = completed = tokens = 0
    for r in records:
        if not r.success:
            continue
        completed += 1
        tokens += r.output_tokens
        tpot = (r.e2e - r.ttft) / (r.output_tokens - 1) if r.output_tokens >= 2 else None
        good += r.ttft * 1000 <= ttft_limit and (tpot is None or tpot * 1000 <= tpot_limit)
        values["ttft"].append(r.ttft * 1000)
        values["e2el"].append(r.e2e * 1000)
        values["itl"] += [gap * 1000 for gap in r.itls]
        if tpot is not None:
            values["tpot"].append(tpot * 1000)
    assert m["completed"] == completed
    assert m["request_goodput"] == pytest.approx(good / duration)
    assert m["output_throughput"] == pytest.approx(tokens / duration)
    for name, v in values.items():
        if not v:
            assert m[f"mean_{name}_ms"] is None
            continue
        assert m[f"mean_{name}_ms"] == pytest.approx(statistics.fmean(v))
        assert m[f"median_{name}_ms"] == pytest.approx(statistics.median(v))
        assert m[f"std_{name}_ms"] == pytest.approx(statistics.pstdev(v), abs=1e-6)
        for p in (50, 90, 95, 99):
            assert m[f"p{p}_{name}_ms"] == pytest.approx(percentile(v, p), abs=1e-6)


@given(runs())
def test_peak_concurrency_is_the_largest_overlap(records: list[RequestRecord]) -> None:
    spans = [(r.start, r.start + r.e2e) for r in records if r.e2e > 0]
    # The count only grows at a start, so looking right there finds the peak.
    expected = max((sum(a <= t < b for a, b in spans) for t, _ in spans), default=0)
    assert peak_concurrency(records) == expected
    if spans:
        assert concurrency_steps(records)[-1][1] == 0


def test_latencies_come_in_order_of_start() -> None:
    records = [
        RequestRecord(i, start, ttft=i, e2e=1, success=True) for i, start in enumerate([3.0, 1.0, 2.0])
    ]
    assert latencies_ms(records)["ttft"] == [1000, 2000, 0]
