"""Confidence intervals for latencies of one run, whose requests are not independent.

Requests that overlap share a queue and a batch, so neighbours are correlated and the textbook interval is too
narrow. All intervals here resample circular blocks of neighbours in order of start (Politis and Romano 1992),
blocks of n^(1/3) requests. They cover the noise inside a run, not what changes between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 1000
_CHUNK = 2_000_000  # indices held at once


def block_length(n: int) -> int:
    return max(1, round(n ** (1 / 3)))


def resamples(n: int) -> int:
    """Fewer for very long runs: there the quantiles' own noise is small and the work is not."""
    return int(np.clip(20_000_000 // max(n, 1), 200, RESAMPLES))


def chunk_rows(n: int) -> int:
    """Resamples of n values that are held at once."""
    return max(1, _CHUNK // max(n, 1))


def block_indices(
    n: int, count: int, rng: np.random.Generator, length: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """`count` resamples of range(n) by circular blocks (of `length`, else block_length), handed on in pieces of
    shape [some, n]."""
    length = length or block_length(n)
    blocks = -(-n // length)
    offsets = np.arange(length)
    while count > 0:
        rows = min(count, chunk_rows(n))
        starts = rng.integers(0, n, size=(rows, blocks))
        yield ((starts[:, :, None] + offsets) % n).reshape(rows, blocks * length)[:, :n]
        count -= rows


def bootstrap(
    values: Floats, statistic: Callable[[Floats], Floats], rng: np.random.Generator, count: int | None = None
) -> Floats:
    """`statistic` ([some, n] -> [some]) of resamples of `values` [n], in order of start. Returns [count]."""
    n = len(values)
    pieces = block_indices(n, count or resamples(n), rng)
    return np.concatenate([statistic(values[index]) for index in pieces])


def mean_interval(
    values: Sequence[float] | Floats, rng: np.random.Generator, confidence: float = 0.95
) -> Interval | None:
    """Student's t on the block-bootstrap standard error, with as many degrees of freedom as blocks less
    one.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 2:
        return None
    means = bootstrap(x, lambda v: v.mean(axis=1), rng)
    error = float(means.std()) * np.sqrt(n / (n - 1))  # the bootstrap variance is a plug-in one, 1/n
    half = float(stdtrit(max(1, -(-n // block_length(n)) - 1), 0.5 + confidence / 2)) * error
    return float(x.mean() - half), float(x.mean() + half)


def quantile_interval(
    values: Sequence[float] | Floats, q: float, rng: np.random.Generator, confidence: float = 0.95
) -> Interval | None:
    """Percentile bootstrap for the quantile q in [0, 1]; None where fewer than 5 values leave it no
    meaning.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 5:
        return None
    return percentile_interval(bootstrap(x, lambda v: np.quantile(v, q, axis=1), rng), confidence)


def percentile_interval(samples: Floats, confidence: float = 0.95) -> Interval:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


class GroupedSample:
    """Values that come in groups (inter-token gaps within requests): resampled by whole groups.

    Quantiles of a resample are those of the pooled values, each weighted by how often its group was drawn;
    sorting once makes every resample a cumulative sum.
    """

    def __init__(self, groups: Sequence[Sequence[float]]) -> None:
        sizes = np.array([len(g) for g in groups], dtype=np.int64)
        flat = (
            np.concatenate([np.asarray(g, dtype=np.float64) for g in groups]) if len(groups) else np.zeros(0)
        )
        owner = np.repeat(np.arange(len(groups)), sizes)
        order = np.argsort(flat, kind="stable")
        self.num_groups = len(groups)
        self.sizes = sizes  # [groups]
        self.sums = np.array([float(np.sum(g)) for g in groups])  # [groups]
        self.values = flat[order]  # [values], ascending
        self._owner = owner[order]

    def mean(self, drawn: NDArray[np.int64]) -> Floats:
        """Pooled means of resamples; drawn [some, groups] holds group indices. NaN where no value was
        drawn.
        """
        counts = self.sizes[drawn].sum(axis=1)
        sums = self.sums[drawn].sum(axis=1)
        return np.divide(sums, counts, out=np.full(len(drawn), np.nan), where=counts > 0)

    def quantile(self, drawn: NDArray[np.int64], q: float) -> Floats:
        """Pooled quantiles (the smallest value that a share q of the weight does not exceed)."""
        out = np.full(len(drawn), np.nan)
        for i, row in enumerate(drawn):
            weights = np.bincount(row, minlength=self.num_groups)[self._owner]
            total = np.cumsum(weights)
            if len(total) and total[-1]:
                out[i] = self.values[np.searchsorted(total, q * total[-1])]
        return out

    def intervals(
        self, rng: np.random.Generator, confidence: float = 0.95
    ) -> tuple[Interval | None, Interval | None]:
        """Intervals of (mean, median) of the pooled values."""
        n = self.num_groups
        if n < 5 or not len(self.values):
            return None, None
        count = int(np.clip(20_000_000 // len(self.values), 100, RESAMPLES))
        means, medians = [], []
        for drawn in block_indices(n, count, rng):
            means.append(self.mean(drawn))
            medians.append(self.quantile(drawn, 0.5))
        mean, median = np.concatenate(means), np.concatenate(medians)
        return (
            percentile_interval(mean[~np.isnan(mean)], confidence),
            percentile_interval(median[~np.isnan(median)], confidence),
        )
