from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtool.errors import UsageError
from llmtool.workload import arrivals

rates = st.floats(0.01, 1e4)


@given(st.integers(2, 200), rates, st.sampled_from([1e-3, 0.25, 1.0, 4.0, math.inf]), st.integers(0, 2**32))
def test_gamma_offsets_ascend_from_zero_with_exactly_the_rate(
    n: int, rate: float, burstiness: float, seed: int
) -> None:
    offsets = arrivals.gamma(n, rate, burstiness, np.random.default_rng(seed))
    assert len(offsets) == n
    assert offsets[0] == 0.0
    assert np.all(np.diff(offsets) >= 0)
    assert offsets[-1] == pytest.approx((n - 1) / rate)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_sets_the_variation_of_gaps(burstiness: float) -> None:
    gaps = np.diff(arrivals.gamma(200_000, 5.0, burstiness, np.random.default_rng(1)))
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.02)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(arrivals.poisson(100_000, 2.0, np.random.default_rng(2)))
    for t in (0.1, 0.5, 1.0, 2.0):
        assert np.mean(gaps > t) == pytest.approx(math.exp(-2.0 * t), abs=0.006)


def test_constant_and_at_once() -> None:
    assert arrivals.constant(4, 2.0).tolist() == [0.0, 0.5, 1.0, 1.5]
    assert arrivals.at_once(3).tolist() == [0.0, 0.0, 0.0]
    assert arrivals.gamma(3, math.inf, 1.0, np.random.default_rng(0)).tolist() == [0.0, 0.0, 0.0]


def test_same_seed_same_arrivals() -> None:
    first, again, other = (arrivals.poisson(50, 3.0, np.random.default_rng(s)).tolist() for s in (7, 7, 8))
    assert first == again != other


@pytest.mark.parametrize(("a", "b"), [(1.0, 9.0), (9.0, 1.0), (0.0, 4.0), (4.0, 0.0), (3.0, 3.0)])
def test_ramp_counts_follow_the_integral_of_the_rate(a: float, b: float) -> None:
    n = 20_001
    offsets = arrivals.ramp(n, a, b, math.inf, np.random.default_rng(0))  # constant gaps in unit time
    span = 2 * (n - 1) / (a + b)
    assert offsets[-1] == pytest.approx(span, rel=1e-6)
    assert np.all(np.diff(offsets) >= 0)
    for share in (0.1, 0.35, 0.5, 0.8):
        t = share * span
        expected = a * t + (b - a) * t * t / (2 * span)
        assert np.searchsorted(offsets, t) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize(("a", "b"), [(-1.0, 2.0), (0.0, 0.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_ramp_refuses_rates_that_make_none(a: float, b: float) -> None:
    with pytest.raises(UsageError):
        arrivals.ramp(10, a, b, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0)])
def test_gamma_refuses_bad_parameters(rate: float, burstiness: float) -> None:
    with pytest.raises(UsageError):
        arrivals.gamma(10, rate, burstiness, np.random.default_rng(0))


def test_trace_times_start_at_zero_and_speed_up() -> None:
    assert arrivals.from_trace([10.0, 11.0, 14.0], speedup=2.0).tolist() == [0.0, 0.5, 2.0]
    with pytest.raises(UsageError, match="no arrival times"):
        arrivals.from_trace([0.0, None])
