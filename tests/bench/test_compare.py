"""Comparisons of results whose true ratio is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmtool.bench.compare import CompareResult, Comparison, compare
from llmtool.bench.result import read_result
from llmtool.errors import UsageError
from llmtool.workload.metrics import RequestRecord
from tests.bench.made import made_records, made_result, made_run


def versus(a_seed: int, b_seed: int, scale: float, **changes: int) -> CompareResult:
    sizes = {k: v for k, v in changes.items() if k != "prompts"}
    a = made_result(made_run(made_records(a_seed, **sizes), goodput=["ttft:200"]))
    b = made_result(made_run(made_records(b_seed, scale=scale, **changes), goodput=["ttft:200"]))
    return compare(a, b)


def by_name(result: CompareResult) -> dict[str, Comparison]:
    return {c.metric: c for c in result.runs[0].metrics}


def test_a_real_difference_is_found_and_its_size_is_right() -> None:
    metrics = by_name(versus(1, 2, 1.3))
    for name in (
        "mean_ttft_ms",
        "median_ttft_ms",
        "mean_tpot_ms",
        "mean_e2el_ms",
        "mean_itl_ms",
        "median_itl_ms",
    ):
        c = metrics[name]
        assert c.verdict == "worse", name
        assert c.low is not None
        assert c.high is not None
        assert c.low <= 1.3 <= c.high
        assert c.ratio == pytest.approx((c.b or 0) / (c.a or 1))
    assert by_name(versus(1, 2, 0.7))["mean_ttft_ms"].verdict == "better"
    assert metrics["request_goodput"].higher_is_better
    assert metrics["request_goodput"].verdict == "worse"


@pytest.mark.parametrize("prompts", [0, 1])
def test_equal_systems_are_rarely_called_different(prompts: int) -> None:
    """A/A: 40 pairs of runs of one system, its requests queueing behind each other. At most 10 % of the comparisons
    may claim any difference in any metric."""
    alarms = 0
    for i in range(40):
        sides = [made_run(queued(100 * k + i, prompts=k * prompts)) for k in (1, 2)]
        verdicts = {c.verdict for c in by_name(compare(*map(made_result, sides))).values()}
        alarms += bool(verdicts & {"better", "worse"})
    assert alarms <= 4


def queued(seed: int, prompts: int = 0) -> list[RequestRecord]:
    """One server, three quarters busy: waits add to TTFT and are shared by neighbours (Lindley's recursion)."""
    records, wait, before = made_records(seed, n=150, gaps=4, prompts=prompts), 0.0, None
    services = np.random.default_rng(seed + 7).exponential(0.075, size=len(records))
    for record, service in zip(records, services, strict=True):
        wait = 0.0 if before is None else max(0.0, wait - (record.start - before))
        before = record.start
        record.ttft += wait
        record.e2e += wait
        wait += service
    return records


def test_what_cannot_be_told_is_unclear_and_short_runs_have_no_p99() -> None:
    metrics = by_name(versus(1, 2, 1.0))
    c = metrics["mean_ttft_ms"]
    assert c.verdict == "unclear" and (c.high or 0) > 1.05  # 120 requests do not resolve 5 %
    assert metrics["p99_ttft_ms"].verdict == "unknown" and metrics["p99_ttft_ms"].low is None
    long = by_name(versus(1, 2, 1.0, n=600, gaps=1))
    assert long["p99_ttft_ms"].low is not None
    assert by_name(versus(1, 2, 1.0, n=3000, gaps=1))["mean_e2el_ms"].verdict == "same"


def test_a_burst_has_no_interval_of_its_throughput() -> None:
    a, b = made_records(1), made_records(2)
    for r in (*a, *b):
        r.start = 0.0
    metrics = by_name(compare(made_result(made_run(a)), made_result(made_run(b))))
    assert metrics["request_throughput"].verdict == "unknown"
    assert metrics["mean_ttft_ms"].low is not None


def test_differing_hit_rates_are_noted() -> None:
    a, b = made_run(made_records(1)), made_run(made_records(2))
    b = replace(b, server={"prefix_cache_hit_rate": 0.9})
    assert any("90.0 % in B" in note for note in compare(made_result(a), made_result(b)).notes)
    assert not any("hit rates" in note for note in compare(made_result(a), made_result(a)).notes)


def test_the_same_requests_are_compared_in_pairs_and_more_sharply() -> None:
    """Prompt lengths make most of TTFT's variance here: pairing takes it out."""
    paired = versus(1, 2, 1.0)
    unpaired = versus(1, 2, 1.0, prompts=9)
    assert paired.runs[0].paired
    assert not unpaired.runs[0].paired
    sharp, dull = (by_name(r)["mean_e2el_ms"] for r in (paired, unpaired))
    assert (sharp.high or 0) - (sharp.low or 0) < (dull.high or 0) - (dull.low or 0)
    assert any("different requests" in note for note in unpaired.notes)


def test_a_file_against_itself() -> None:
    metrics = by_name(versus(1, 1, 1.0))
    latencies = [c for c in metrics.values() if c.metric.endswith("_ms")]
    assert len(latencies) == 11
    assert {c.verdict for c in latencies} == {"same", "unknown"}  # no p99 of 120 values
    latencies = [c for c in latencies if not c.metric.startswith("p99")]
    assert all(c.ratio == 1.0 == c.low == c.high for c in latencies)


def test_throughput_differences() -> None:
    a = made_result(made_run(made_records(1, rate=10.0)))
    b = made_result(made_run(made_records(2, rate=20.0)))
    metrics = by_name(compare(a, b))
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        assert metrics[name].verdict == "better"
        assert (metrics[name].low or 0) < (metrics[name].ratio or 0) < (metrics[name].high or 0)


def test_effects_too_small_to_matter_are_the_same() -> None:
    a, b = made_records(1), made_records(1)
    for r in b:
        r.ttft *= 1.004
    result = compare(made_result(made_run(a)), made_result(made_run(b)))
    c = by_name(result)["mean_ttft_ms"]
    assert (c.low or 0) > 1  # beyond noise, but four in a thousand
    assert c.verdict == "same"
    loose = compare(made_result(made_run(a)), made_result(made_run(b)), min_effect=0.0)
    assert by_name(loose)["mean_ttft_ms"].verdict == "worse"


def test_too_few_requests_are_unknown() -> None:
    tiny = made_result(made_run(made_records(1, n=4)))
    metrics = by_name(compare(tiny, tiny))
    assert {c.verdict for c in metrics.values()} == {"unknown"}
    assert metrics["mean_ttft_ms"].ratio == 1.0


def test_goodput_under_other_objectives_is_not_compared() -> None:
    a = made_result(made_run(made_records(1), goodput=["ttft:200"]))
    b = made_result(made_run(made_records(2), goodput=["ttft:300"]))
    assert "request_goodput" not in by_name(compare(a, b))


def test_sweeps_pair_by_rate() -> None:
    a = made_result(made_run(made_records(1), 1.0), made_run(made_records(2), 2.0))
    b = made_result(made_run(made_records(3), 2.0), made_run(made_records(4), 4.0))
    result = compare(a, b)
    assert [run.request_rate for run in result.runs] == [2.0]
    with pytest.raises(UsageError, match="no request rate in common"):
        compare(a, made_result(made_run(made_records(3), 8.0), made_run(made_records(4), 9.0)))


def test_differing_settings_are_listed_and_it_is_all_json(tmp_path: Path) -> None:
    run = made_run(made_records(1))
    a = made_result(run, label="before")
    b = made_result(
        run, config={"num_prompts": 120, "request_rate": "inf", "ignore_eos": True}, versions={"torch": "3"}
    )
    a.write(tmp_path / "a.json")
    b.write(tmp_path / "b.json")
    result = compare(read_result(tmp_path / "a.json"), read_result(tmp_path / "b.json"))
    assert result.differences == {
        "ignore_eos": [None, True],
        "version of python": ["3.11", None],
        "version of torch": [None, "3"],
    }
    assert (result.a, result.b) == ("before", "http://127.0.0.1:8000")
    json.dumps(result.as_dict(), allow_nan=False)


def test_same_seed_same_intervals() -> None:
    assert versus(1, 2, 1.1) == versus(1, 2, 1.1)
    with pytest.raises(UsageError):
        compare(made_result(), made_result(), confidence=1.0)
