"""The work list: all tiles' tokens read once, programs equally busy, partial results found again."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import pytest
from llmtool_kernels.gpu.plan import FIELDS, max_segments, max_slots, num_tiles, plan_segments


def segments(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    chosen: Sequence[int] | None = None,
    kv_heads: int = 2,
    group: int = 4,
    window: int | None = None,
    block_m: int = 16,
    block_n: int = 32,
    programs: int = 20,
    tree: bool = False,
) -> list[list[dict[str, int]]]:
    """Per program its segments; what must hold of any plan is checked on the way."""
    chosen = list(range(len(query_lens))) if chosen is None else chosen
    plan = plan_segments(
        query_lens, kv_lens, chosen, kv_heads, group, window, block_m, block_n, programs, tree
    )
    rows = [dict(zip(FIELDS, row, strict=True)) for row in plan.rows.tolist()]
    assert len(rows) <= max_segments(num_tiles(query_lens, chosen, kv_heads, group, block_m), programs)
    assert plan.num_slots <= max_slots(programs)
    assert plan.num_counters <= programs
    tiles = defaultdict(list)
    for row in rows:
        tiles[row["sequence"], row["kv_head"], row["first_row"]].append(row)
    expected = {
        (s, head, first)
        for s in chosen
        for head in range(kv_heads)
        for first in range(0, query_lens[s] * group, block_m)
    }
    assert set(tiles) == expected
    slots, counters = [], []
    for (s, _, first), parts in tiles.items():
        context = kv_lens[s] - query_lens[s]
        last = min(first + block_m, query_lens[s] * group) - 1
        oldest = context + (0 if tree else first // group)
        begin = 0 if window is None else max(0, oldest + 1 - window)
        assert parts[0]["begin"] == begin
        assert parts[-1]["end"] == context + last // group + 1
        assert all(a["end"] == b["begin"] for a, b in pairwise(parts))
        assert all(p["end"] > p["begin"] for p in parts)
        assert all(p["context"] == context and p["num_rows"] == query_lens[s] * group for p in parts)
        assert all(p["query_start"] == sum(query_lens[:s]) for p in parts)
        if len(parts) == 1:
            assert parts[0]["slot"] == -1
            continue
        assert {p["num_slots"] for p in parts} == {len(parts)}
        assert [p["slot"] - p["first_slot"] for p in parts] == list(range(len(parts)))
        assert len({p["counter"] for p in parts}) == 1
        slots += [p["slot"] for p in parts]
        counters.append(parts[0]["counter"])
    assert sorted(slots) == list(range(plan.num_slots))
    assert sorted(counters) == list(range(plan.num_counters))
    starts = plan.starts.tolist()
    assert starts[0] == 0 and starts[-1] == len(rows) and starts == sorted(starts)
    return [rows[a:b] for a, b in pairwise(starts)]


def loads(programs: list[list[dict[str, int]]], block_n: int = 32) -> list[int]:
    return [sum(-(-(s["end"] - s["begin"]) // block_n) for s in program) for program in programs]


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("tree", [False, True])
def test_any_step_is_covered_once(window: int | None, tree: bool) -> None:
    rng = random.Random(0)
    for _ in range(60):
        query_lens = [rng.choice([1, 1, 2, 9, 40]) for _ in range(rng.randint(1, 12))]
        kv_lens = [n + rng.choice([0, 3, 100, 2000]) for n in query_lens]
        chosen = sorted(rng.sample(range(len(kv_lens)), rng.randint(1, len(kv_lens))))
        group, programs = rng.choice([1, 3, 4, 40]), rng.choice([1, 7, 64])
        segments(query_lens, kv_lens, chosen, 2, group, window, programs=programs, tree=tree)


def test_one_long_sequence_beside_many_short_ones() -> None:
    work = loads(segments([1] * 32, [65536] + [512] * 31, kv_heads=8, programs=264))
    assert max(work) <= 1.1 * sum(work) / len(work)


def test_a_chunk_of_a_prompt_beside_decodes() -> None:
    work = loads(segments([1] * 20 + [512], [2000] * 20 + [8192], kv_heads=8, programs=264))
    assert max(work) <= 1.1 * sum(work) / len(work)


def test_equal_sequences_are_not_cut_where_that_gains_little() -> None:
    programs = segments([1] * 33, [4096] * 33, kv_heads=8, programs=264)
    assert all(len(program) == 1 and program[0]["slot"] == -1 for program in programs)


def test_a_single_sequence_keeps_every_program_busy() -> None:
    work = loads(segments([1], [65536], kv_heads=8, programs=264))
    assert min(work) >= 0.9 * max(work)


def test_short_work_is_not_cut_into_crumbs() -> None:
    programs = segments([1], [1024], kv_heads=8, programs=264)
    assert sum(bool(program) for program in programs) == 128
    assert max(loads(programs)) == 2
