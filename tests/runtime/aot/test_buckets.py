"""The choice of buckets, against every choice."""

import random
from itertools import combinations

from llmtool.runtime.aot.buckets import Hotness, bucket_of, choose_buckets


def total(counts: dict[int, float], buckets: tuple[int, ...], cost: dict[int, float], each: float) -> float:
    return each * len(buckets) + sum(
        count * cost[min(b for b in buckets if b >= size)] for size, count in counts.items() if count
    )


def test_choice_is_the_cheapest() -> None:
    rng = random.Random(1)
    for _ in range(200):
        sizes = sorted(rng.sample(range(1, 65), rng.randrange(1, 8)))
        counts = {size: float(rng.randrange(0, 20)) for size in sizes}
        counts[sizes[-1]] += 1
        steps = sorted(rng.random() for _ in range(64))
        cost = {size: steps[size - 1] for size in range(1, 65)}
        limit, each = rng.randrange(1, 6), rng.choice((0.0, 1.0, 5.0))
        chosen = choose_buckets(counts, cost.__getitem__, limit, each)
        present = [size for size in sizes if counts[size]]
        tried = [
            total(counts, (*rest, present[-1]), cost, each)
            for k in range(limit)
            for rest in combinations(present[:-1], k)
        ]
        assert len(chosen) <= limit
        assert abs(total(counts, chosen, cost, each) - min(tried)) < 1e-9


def test_no_steps_no_buckets() -> None:
    assert choose_buckets({}, float, 3) == ()
    assert choose_buckets({4: 0.0}, float, 3) == ()


def test_smallest_bucket_that_holds() -> None:
    assert [bucket_of(n, (1, 4, 16)) for n in (1, 2, 4, 5, 16, 17)] == [1, 4, 4, 16, 16, None]
    assert bucket_of(1, ()) is None


def test_hottest_first() -> None:
    hot = Hotness(threshold=2)
    hot.note(8, 5.0)
    assert hot.hottest() is None  # seen once
    hot.note(1, 0.1)
    hot.note(1, 0.1)
    assert hot.hottest() == 1
    hot.note(8, 0.5)
    assert hot.hottest() == 8
    hot.forget(8)
    assert hot.hottest() == 1
