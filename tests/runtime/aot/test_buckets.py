"""The choice of buckets, against every choice."""

import random
from itertools import combinations

from llmtool.runtime.aot.buckets import Hotness, Ladder, bucket_of, choose_buckets


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


def test_a_ladder_follows_the_sizes_that_come() -> None:
    """After FIRST steps the buckets are those that pad the steps so far least, and larger given ones; what is
    captured stays."""
    rng = random.Random(5)
    given = (1, 2, 4, 8, 16, 32)
    ladder, sizes = Ladder(given), [rng.choice((5, 5, 5, 11)) for _ in range(Ladder.FIRST)]
    for size in sizes[:-1]:
        ladder.note(size, [8])
        assert ladder.buckets == given
    ladder.note(sizes[-1], [8])
    assert ladder.buckets == (5, 8, 11, 16, 32)
    assert [ladder.bucket_of(n) for n in (1, 5, 6, 9, 12, 33)] == [5, 5, 8, 11, 16, None]
    padded = [sum((bucket_of(s, buckets) or 0) - s for s in sizes) for buckets in (given, ladder.buckets)]
    assert padded[1] == 0 < padded[0]


def test_a_bucket_that_saves_little_is_none() -> None:
    ladder = Ladder((8, 64))
    for i in range(Ladder.FIRST):
        ladder.note(31 if i % 100 == 0 else 32, [])
    assert ladder.buckets == (32, 64)
