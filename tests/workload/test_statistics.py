"""Intervals: coverage on data whose truth is known, and the weighted quantile against a plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.workload.statistics import (
    GroupedSample,
    block_indices,
    block_length,
    mean_interval,
    quantile_interval,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32))
def test_resamples_are_circular_blocks_of_neighbours(n: int, count: int, seed: int) -> None:
    drawn = np.concatenate(list(block_indices(n, count, np.random.default_rng(seed))))
    assert drawn.shape == (count, n)
    assert drawn.min() >= 0
    assert drawn.max() < n
    length = block_length(n)
    steps = np.diff(drawn, axis=1) % n
    inside = np.arange(1, n) % length != 0
    assert np.all(steps[:, inside] == 1 % n)


def test_mean_interval_covers_independent_values() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = mean_interval(rng.exponential(2.0, size=60), rng) or (0.0, 0.0)
        hits += low <= 2.0 <= high
    assert 0.88 <= hits / 300 <= 0.99


def test_blocks_cover_correlated_values_where_an_ordinary_interval_does_not() -> None:
    rng = np.random.default_rng(1)
    blocks = plain = 0
    for _ in range(200):
        x = np.zeros(400)
        for i in range(1, 400):  # an AR(1) queue-like series of mean 0
            x[i] = 0.6 * x[i - 1] + rng.normal()
        low, high = mean_interval(x, rng) or (1.0, 1.0)
        blocks += low <= 0 <= high
        half = 1.96 * x.std() / 20
        plain += abs(x.mean()) <= half
    assert plain / 200 < 0.75
    assert blocks / 200 > 0.83


def test_quantile_interval_covers() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = quantile_interval(rng.normal(10.0, 1.0, size=120), 0.5, rng) or (0.0, 0.0)
        hits += low <= 10.0 <= high
    assert 0.87 <= hits / 200 <= 1.0


def test_too_few_values_have_no_interval() -> None:
    rng = np.random.default_rng(0)
    assert mean_interval([1.0], rng) is None
    assert mean_interval([1.0, 1.0], rng) == pytest.approx((1.0, 1.0))
    assert quantile_interval([1.0] * 4, 0.5, rng) is None
    assert GroupedSample([]).intervals(rng) == (None, None)
    assert GroupedSample([[], [], [], [], []]).intervals(rng) == (None, None)


groups = st.lists(st.lists(st.floats(0, 100), max_size=6), min_size=1, max_size=8)


@settings(deadline=None)
@given(groups, st.data())
def test_grouped_statistics_equal_those_of_the_pooled_values(
    values: list[list[float]], data: st.DataObject
) -> None:
    sample = GroupedSample(values)
    n = len(values)
    drawn = np.array([data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))])
    pooled = sorted(v for g in drawn[0] for v in values[g])
    mean, median = sample.mean(drawn)[0], sample.quantile(drawn, 0.5)[0]
    if not pooled:
        assert np.isnan(mean)
        assert np.isnan(median)
        return
    assert mean == pytest.approx(sum(pooled) / len(pooled))
    assert median == pooled[(len(pooled) - 1) // 2]  # the lower median


def test_groups_widen_the_interval() -> None:
    """Gaps of one request are alike: 20 requests of 100 equal gaps know no more than 20 numbers."""
    rng = np.random.default_rng(3)
    per_request = rng.normal(10, 1, size=20)
    grouped, _ = GroupedSample([[v] * 100 for v in per_request]).intervals(rng)
    alone = mean_interval(np.repeat(per_request, 1), rng)
    assert grouped is not None
    assert alone is not None
    assert (grouped[1] - grouped[0]) > 0.5 * (alone[1] - alone[0])
