"""Replayed requests: equal to taking every step by itself, and answers that can be counted by hand."""

import random
from collections import deque

import numpy as np
import pytest

from llmtool.memprofile.demand import Demand
from llmtool.memprofile.profile import fit
from llmtool.memprofile.replay import Replay, replay
from llmtool.memprofile.requests import WORKLOADS, Ask, Segment, from_rows, named
from llmtool.workload.traces import TraceRow

LONGEST = 400


def made(capacity: int, per_page: int = 100, page: int = 16, window: int = 0, state: int = 0) -> Demand:
    """One layer type of `per_page` bytes a page; with a window, it keeps only the pages of so many tokens."""
    n = np.arange(LONGEST + 1)
    live = np.minimum(n, window) if window else n
    pages = np.where(n > 0, -(-n // page) - (n - live) // page, 0)
    table = (pages * per_page + state)[None, :].astype(np.int64)
    share = 0.0 if window else per_page / page
    return Demand(
        "made",
        np.array([capacity], dtype=np.int64),
        table,
        table,
        table,
        ("full",),
        np.array([share]),
        np.array([per_page / page if window else 0.0]),
        window,
        np.array([state], dtype=np.int64),
        True,
        None,
    )


def step_by_step(
    d: Demand, asks: list[Ask], max_seqs: int, page: int
) -> tuple[int, int, list[int], list[int]]:
    """(steps, preemptions, batch of every step while somebody waits, and after), by the rules and nothing else."""
    table, capacity = d.table[0], int(d.capacity[0])
    tall = min(LONGEST, 4096)
    growth = (table[tall] - table[tall // 2]) * page / (tall - tall // 2)
    waiting, running = deque(range(len(asks))), list[int]()
    length, made = {}, dict.fromkeys(range(len(asks)), 0)
    steps = preemptions = 0
    batches, after = [], []
    ended = True
    while waiting or running:
        while ended and waiting and len(running) < max_seqs:
            known = asks[waiting[0]].prompt + made[waiting[0]]
            taken = sum(table[length[r] + 1] for r in running)
            if running and taken + table[known + 1] + growth * (len(running) // 2) > capacity:
                break
            r = waiting.popleft()
            running.append(r)
            length[r] = known
        while sum(table[length[r] + 1] for r in running) > capacity:
            preemptions += 1
            waiting.appendleft(running.pop())
        (batches if waiting else after).append(len(running))
        steps += 1
        ended = False
        for r in list(running):
            length[r] += 1
            made[r] += 1
            if made[r] == asks[r].output:
                running.remove(r)
                ended = True
    return steps, preemptions, batches, after


@pytest.mark.parametrize("seed", range(30))
def test_quiet_steps_at_once_are_steps_one_by_one(seed: int) -> None:
    draw = random.Random(seed)
    window = draw.choice([0, 0, 64])
    asks = [Ask(draw.randint(1, 200), draw.randint(1, 200)) for _ in range(40)]
    d = made(draw.choice([3000, 6000, 20000]), window=window, state=draw.choice([0, 150]))
    max_seqs = draw.choice([4, 64])
    r = replay(d, asks, max_seqs)
    steps, preemptions, batches, after = step_by_step(d, asks, max_seqs, 16)
    assert (r.steps, r.preemptions, r.never) == (steps, preemptions, 0)
    ordered = sorted(batches or after)
    assert r.p50 == ordered[-(-len(ordered) // 2) - 1] and r.p95 == ordered[-(-len(ordered) * 95 // 100) - 1]
    assert r.mean == pytest.approx(sum(batches + after) / steps) and r.peak == ordered[-1]


def conserve(r: Replay) -> None:
    for m in r.moments:
        assert 0 <= m.taken.sum() - m.shared + m.cached <= r.arena + 2 * len(r.moments)


def test_a_document_asked_again_is_found() -> None:
    documents = [Segment(i, 160) for i in range(3)]
    asks = [Ask(170, 4, (documents[i % 3],)) for i in range(12)]
    r = replay(made(100_000), asks, max_seqs=1)
    assert r.hit_rate == pytest.approx(9 * 160 / (12 * 170))
    conserve(r)
    # Room for one document beside the one that is asked: each comes back too late.
    assert replay(made(2100), asks, max_seqs=1).hit_rate == 0
    # Together they share it, and more of them fit.
    same = [Ask(170, 4, (documents[0],)) for _ in range(12)]
    assert replay(made(2500), same, 64).peak > replay(made(2500), [Ask(170, 4)] * 12, 64).peak


def test_windows_are_shared_while_nobody_has_left_them() -> None:
    asks = [Ask(96, 4, (Segment(1, 80),))] * 8
    for window in (0, 400):  # as if the layer kept everything
        assert replay(made(2800, window=window), asks, 8).peak == 8
    assert replay(made(2800, window=64), asks, 8).peak < 8, "out of the window nothing is counted as shared"


def test_states_are_found_only_at_checkpoints() -> None:
    marked = (
        Segment(1, 64, checkpoint=False),
        Segment(2, 64, checkpoint=True),
        Segment(3, 64, checkpoint=False),
    )
    asks = [Ask(200, 2, marked)] * 2
    assert replay(made(100_000, state=500), asks, 1).hit_rate == pytest.approx(128 / 400)
    assert replay(made(100_000), asks, 1).hit_rate == pytest.approx(192 / 400)


def test_a_conversation_goes_on_when_its_answer_is_there() -> None:
    first = Ask(50, 30, (Segment(1, 50),), answer=2)
    second = Ask(120, 10, (Segment(1, 50), Segment(2, 30), Segment(3, 40)), after=0)
    r = replay(made(100_000), [first, second], 8)
    assert r.steps == 40 and r.hit_rate == pytest.approx(80 / 170) and r.peak == 1


def test_what_never_fits_is_counted_and_left_out() -> None:
    r = replay(made(1000), [Ask(10, 5), Ask(200, 5), Ask(10, 5)], 8)
    assert r.never == 1 and r.steps == 5 and not r.saturated


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_named_workloads(name: str) -> None:
    asks = named(name, 200)
    assert len(asks) >= 200 and asks == named(name, 200) and asks != named(name, 200, seed=1)
    for i, ask in enumerate(asks):
        assert ask.prompt >= max(1, sum(s.tokens for s in ask.segments)) and ask.output >= 1
        assert ask.after is None or ask.after < i
    short, longer = fit(asks, 4000)
    assert len(short) + longer == len(asks) and all(a.length <= 4000 for a in short)
    assert all(a.after is None or a.after < i for i, a in enumerate(short))


def test_a_trace_s_blocks_are_shared_prefixes() -> None:
    rows = [TraceRow(0.0, 1100, 7, (5, 6, 7)), TraceRow(1.0, 600, 3)]
    first, second = from_rows(rows, checkpoint=1024)
    assert first.segments == (Segment(5, 512, False), Segment(6, 512, True)) and first.length == 1107
    assert second.segments == ()
