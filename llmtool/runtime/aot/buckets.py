"""Which sizes are prepared: a step of any size runs in the next larger bucket, padded. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def choose_buckets(
    counts: Mapping[int, float], cost: Callable[[int], float], limit: int, per_bucket: float = 0.0
) -> tuple[int, ...]:
    """At most `limit` sizes, ascending, of the least total cost for steps that come in sizes with these counts.

    cost(size): of one step in a bucket of that size, not falling with it. per_bucket: of having a bucket at all
    (preparation, memory), in the same unit. The largest size is always a bucket, so that every step has one, and
    a bucket that is no size of a step never helps: O(sizes^2 * limit) by dynamic programming.
    """
    assert limit >= 1
    sizes = sorted(size for size, count in counts.items() if count > 0)
    if not sizes:
        return ()
    price = [cost(size) for size in sizes]
    total = [0.0]
    for size in sizes:
        total.append(total[-1] + counts[size])
    n, sums = len(sizes), np.asarray(total)
    # least[j]: of steps up to sizes[j - 1], its bucket the last; chosen[k][j]: where the bucket before that is.
    least = np.full(n + 1, np.inf)
    least[0] = 0.0
    best: tuple[float, tuple[int, ...]] = (float("inf"), ())
    chosen: list[list[int]] = []
    for k in range(min(limit, n)):
        row, new = [0] * (n + 1), np.full(n + 1, np.inf)
        for j in range(k + 1, n + 1):
            took = least[k:j] + (sums[j] - sums[k:j]) * price[j - 1] + per_bucket
            i = int(took.argmin())
            row[j], new[j] = k + i, took[i]
        chosen.append(row)
        least = new
        if least[n] < best[0]:
            best = (float(least[n]), _traced(sizes, chosen))
    return best[1]


def _traced(sizes: Sequence[int], chosen: Sequence[Sequence[int]]) -> tuple[int, ...]:
    buckets, j = [], len(sizes)
    for row in reversed(chosen):
        buckets.append(sizes[j - 1])
        j = row[j]
    return tuple(reversed(buckets))


def bucket_of(size: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds `size`; None where none does. buckets: ascending."""
    at = bisect_left(buckets, size)
    return buckets[at] if at < len(buckets) else None


class Ladder:
    """The buckets of steps that differ in their size alone: first the given ones, then those that would have padded
    the steps seen so far the least.

    A step in a bucket takes what its sequences take, and a part that is the same for all: what is chosen does not
    depend on either, so that it needs no measured times. Chosen anew when steps have doubled, from FIRST on:
    seldom, as a new bucket costs a capture, and one that saves less than WORTH of the rows is none. made: buckets
    that are captured, and stay.
    """

    FIRST = 256
    WORTH = 0.02

    def __init__(self, buckets: Sequence[int]) -> None:
        self._given = tuple(buckets)
        self._seen: Counter[int] = Counter()
        self._steps, self._due = 0, self.FIRST
        self.buckets = self._given

    def bucket_of(self, size: int) -> int | None:
        return bucket_of(size, self.buckets)

    def note(self, size: int, made: Sequence[int]) -> None:
        """A step of this size was run."""
        self._seen[size] += 1
        self._steps += 1
        if self._steps < self._due:
            return
        self._due *= 2
        rows = sum(size * count for size, count in self._seen.items())
        chosen = choose_buckets(self._seen, float, len(self._given), self.WORTH * rows)
        above = [b for b in self._given if b > chosen[-1]]  # for sizes not seen yet
        self.buckets = tuple(sorted({*chosen, *made, *above}))


class Hotness:
    """Which bucket to prepare next: the one whose steps have lost most by running unprepared.

    A bucket is worth preparing once `threshold` steps came in it; of those the one with the most lost seconds."""

    def __init__(self, threshold: int = 2) -> None:
        self.threshold = threshold
        self._steps: dict[int, int] = {}
        self._seconds: dict[int, float] = {}

    def note(self, bucket: int, seconds: float) -> None:
        """A step of this bucket ran unprepared, and took so long."""
        self._steps[bucket] = self._steps.get(bucket, 0) + 1
        self._seconds[bucket] = self._seconds.get(bucket, 0.0) + seconds

    def forget(self, bucket: int) -> None:
        """It is prepared, or cannot be."""
        self._steps.pop(bucket, None)
        self._seconds.pop(bucket, None)

    def hottest(self) -> int | None:
        ready = [b for b, steps in self._steps.items() if steps >= self.threshold]
        return max(ready, key=lambda b: (self._seconds[b], b), default=None)
