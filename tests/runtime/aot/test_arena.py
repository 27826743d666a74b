"""The arena: no bytes are shared by what may live at once, in any order the schedule leaves open."""

import random

import numpy as np

from llmtool.runtime.aot.arena import Buffer, buffers_of, overlaps, plan_arena
from llmtool.runtime.aot.order import scheduled
from llmtool.runtime.aot.streams import assign
from llmtool.runtime.aot.tasks import Task, dependencies
from tests.runtime.aot.graphs import linear_extension, random_program, stream_edges

POISON = 255


def test_random_interleavings_with_freed_bytes_poisoned() -> None:
    rng = random.Random(1)
    reused = 0
    for _ in range(120):
        tasks = random_program(rng, 18, 16)
        nbytes = {b: rng.randrange(1, 400) for b in range(16)}
        kept = frozenset(b for b in range(16) if rng.random() < 0.15)
        graph = dependencies(tasks)
        made = assign(graph, rng.choice(("serial", "exact", "edges")))
        schedule = scheduled(18, graph.edges, made.streams)
        buffers = buffers_of(tasks, nbytes, kept)
        plan = plan_arena(list(buffers.values()), schedule)
        assert not overlaps(plan, list(buffers.values()), schedule)
        assert plan.least <= plan.nbytes <= plan.no_reuse
        reused += plan.nbytes < plan.no_reuse
        place = dict(zip(buffers, plan.offsets, strict=True))
        edges = [*stream_edges(made.streams), *made.waits]
        for _ in range(4):
            run(tasks, linear_extension(rng, 18, edges), place, nbytes, plan.nbytes, kept)
    assert reused > 80


def run(
    tasks: list[Task],
    turn: list[int],
    place: dict[int, int],
    nbytes: dict[int, int],
    size: int,
    kept: frozenset[int],
) -> None:
    """Each write fills its buffer with the writer's number; each read must find it whole."""
    arena = np.full(size, POISON, np.uint8)
    users = {b: {i for i, t in enumerate(tasks) if b in t.reads | t.writes} for b in place}
    written: dict[int, int] = {}

    def bytes_of(b: int) -> np.ndarray:  # type: ignore[type-arg]
        return arena[place[b] : place[b] + nbytes[b]]

    for i in turn:
        for b in tasks[i].reads:
            assert (bytes_of(b) == written[b]).all()
        for b in tasks[i].writes:
            bytes_of(b)[:] = written[b] = i
        for b in tasks[i].reads | tasks[i].writes:
            users[b].discard(i)
            if not users[b] and b not in kept:
                bytes_of(b)[:] = POISON
    for b in kept & set(place):
        assert (bytes_of(b) == written[b]).all()


def test_a_chain_needs_two_buffers() -> None:
    n = 10
    tasks = [
        Task(str(i), frozenset({i - 1}) if i else frozenset(), frozenset({i}), seconds=1.0) for i in range(n)
    ]
    graph = dependencies(tasks)
    buffers = list(buffers_of(tasks, dict.fromkeys(range(n), 640), frozenset()).values())
    plan = plan_arena(buffers, scheduled(n, graph.edges, [0] * n))
    assert (plan.nbytes, plan.no_reuse, plan.least) == (1280, 6400, 1280)


def test_concurrency_keeps_branches_apart() -> None:
    """Two branches of two: one after the other, the first's inner buffer is free again; side by side it is not."""
    x = frozenset
    tasks = [
        Task("in", x(), x({0})),
        *(Task("a1", x({0}), x({1})), Task("a2", x({1}), x({2}))),
        *(Task("b1", x({0}), x({3})), Task("b2", x({3}), x({4}))),
        Task("out", x({2, 4}), x({5})),
    ]
    graph = dependencies(tasks)
    buffers = list(buffers_of(tasks, {0: 64, 1: 6400, 2: 64, 3: 6400, 4: 64, 5: 64}, frozenset({5})).values())
    serial = plan_arena(buffers, scheduled(6, graph.edges, [0] * 6))
    full = plan_arena(buffers, scheduled(6, graph.edges, assign(graph, "exact").streams))
    assert serial.nbytes < 7000 < 12800 <= full.nbytes


def test_nothing_to_place() -> None:
    schedule = scheduled(0, (), ())
    assert plan_arena([], schedule).nbytes == 0
    one = plan_arena([Buffer(0, 0, 1)], scheduled(1, (), [0]))  # an empty tensor has an address of its own
    assert one.nbytes == 64
