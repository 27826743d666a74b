"""Which sizes are prepared: a step of any size runs in the next larger bucket, padded. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence


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
    n = len(sizes)
    # least[j]: of steps up to sizes[j - 1], its bucket the last; chosen[k][j]: where the bucket before that is.
    least = [0.0] + [float("inf")] * n
    best: tuple[float, tuple[int, ...]] = (float("inf"), ())
    chosen: list[list[int]] = []
    for k in range(min(limit, n)):
        row, new = [0] * (n + 1), [float("inf")] * (n + 1)
        for j in range(k + 1, n + 1):
            for i in range(k, j):
                took = least[i] + (total[j] - total[i]) * price[j - 1] + per_bucket
                if took < new[j]:
                    row[j], new[j] = i, took
        chosen.append(row)
        least = new
        if least[n] < best[0]:
            best = (least[n], _traced(sizes, chosen))
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
