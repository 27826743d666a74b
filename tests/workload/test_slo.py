from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtool.errors import UsageError
from llmtool.workload.slo import SLO, parse_slo, parse_slos


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft:200", SLO("ttft", 200.0)),
        ("TPOT:50.5", SLO("tpot", 50.5)),
        ("e2e:1e3", SLO("e2el", 1000.0)),
        ("ttft:p99:500", SLO("ttft", 500.0, 99.0)),
        ("itl:p99.9:80", SLO("itl", 80.0, 99.9)),
    ],
)
def test_forms(text: str, slo: SLO) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft:", "foo:5", "ttft:-5", "ttft:0", "ttft:p0:5", "ttft:p101:5", "ttft:1.2.3", "ttft:5ms"],
)
def test_bad_forms_are_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(UsageError):
        parse_slo(text)


def test_a_bound_on_every_gap_is_ambiguous() -> None:
    with pytest.raises(UsageError, match="itl:p99:50"):
        parse_slo("itl:50")


def test_several_in_one_text_and_duplicates() -> None:
    assert parse_slos(["ttft:200 tpot:50", "ttft:p99:900"]) == (
        SLO("ttft", 200.0),
        SLO("tpot", 50.0),
        SLO("ttft", 900.0, 99.0),
    )
    with pytest.raises(UsageError, match="twice"):
        parse_slos(["ttft:200", "ttft:300"])


@given(
    st.sampled_from(["ttft", "tpot", "e2el", "itl"]),
    st.integers(1, 10**6),
    st.integers(1, 100),
)
def test_written_and_read_again(metric: str, limit: int, percentile: int) -> None:
    slo = SLO(metric, limit / 4, percentile)
    assert parse_slo(str(slo)).metric == metric
    assert parse_slo(str(slo)).limit_ms == pytest.approx(slo.limit_ms, rel=1e-5)
    assert parse_slo(str(slo)).percentile == percentile
