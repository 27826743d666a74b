"""Comparisons of results whose true ratio is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtool.bench.compare import CompareResult, Comparison, compare
from llmtool.bench.result import read_result
from llmtool.errors import UsageError
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


def test_equal_systems_are_the_same_nearly_always() -> None:
    """40 pairs, 95 % intervals: about two false alarms are due, nine would be a broken interval."""
    alarms = sum(
        by_name(versus(100 + i, 200 + i, 1.0, n=60, gaps=2))["mean_ttft_ms"].verdict != "same"
        for i in range(40)
    )
    assert alarms < 9


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
    assert {c.verdict for c in metrics.values()} == {"same"}
    assert all(c.ratio == 1.0 == c.low == c.high for c in latencies)


def test_throughput_differences() -> None:
    a = made_result(made_run(made_records(1, rate=10.0)))
    b = made_result(made_run(made_records(2, rate=20.0)))
    metrics = by_name(compare(a, b))
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        assert metrics[name].verdict == "better"
        assert (metrics[name].low or 0) < (metrics[name].ratio or 0) < (metrics[name].high or 0)


def test_small_effects_are_called_the_same() -> None:
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
