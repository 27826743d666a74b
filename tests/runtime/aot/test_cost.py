"""The simulated time of schedules, and the gate."""

import random
from dataclasses import replace

import pytest

from llmtool.runtime.aot.cost import SyncCost, candidates, gated, simulate
from llmtool.runtime.aot.streams import Assignment, assign, with_waits
from llmtool.runtime.aot.tasks import Task, TaskGraph
from tests.runtime.aot.graphs import program_graph, reachable, stream_edges

FREE = SyncCost()


def fan(seconds: list[float], share: float = 0.1) -> TaskGraph:
    """A task, branches, a task."""
    n = len(seconds)
    tasks = [Task("in"), *(Task(f"b{i}", seconds=s, share=share) for i, s in enumerate(seconds)), Task("out")]
    edges = [(0, i + 1) for i in range(n)] + [(i + 1, n + 1) for i in range(n)]
    return TaskGraph(tuple(tasks), tuple(sorted(edges)))


def test_one_stream_takes_the_sum() -> None:
    graph = fan([3.0, 4.0, 5.0])
    assert simulate(graph, assign(graph, "serial"), FREE) == pytest.approx(12)
    assert simulate(graph, assign(graph, "serial"), SyncCost(launch=1.0)) == pytest.approx(17)


def test_branches_overlap_while_the_device_has_room() -> None:
    graph = fan([3.0, 4.0, 5.0])
    full = assign(graph, "exact")
    assert simulate(graph, full, FREE) == pytest.approx(5)
    # Full tasks side by side take as long as one after the other.
    assert simulate(fan([3.0, 4.0, 5.0], 1.0), full, FREE) == pytest.approx(12)
    # Two of share 0.75: 1.5 of the device is asked for, so both run at 2/3 until the first ends.
    assert simulate(fan([2.0, 4.0], 0.75), assign(fan([2.0, 4.0]), "exact"), FREE) == pytest.approx(5)


def test_waits_cost_both_sides() -> None:
    graph = TaskGraph((Task("a", seconds=2.0), Task("b", seconds=3.0)), ((0, 1),))
    two = with_waits(graph, (0, 1))
    assert simulate(graph, two, SyncCost(fork=0.5, join=0.25)) == pytest.approx(5.75)


def test_time_is_bounded_by_critical_path_and_sum() -> None:
    rng = random.Random(1)
    for _ in range(60):
        graph = program_graph(rng, 20, 15)
        longest = [0.0] * 20
        for v, task in enumerate(graph.tasks):
            longest[v] = task.seconds + max((longest[u] for u, w in graph.edges if w == v), default=0)
        total = sum(task.seconds for task in graph.tasks)
        for mode in ("serial", "exact", "paper"):
            took = simulate(graph, assign(graph, mode), FREE)
            assert max(longest) - 1e-12 <= took <= total + 1e-12


def test_the_gate_is_never_slower_on_paper_and_keeps_every_edge() -> None:
    rng = random.Random(2)
    for sync in (FREE, SyncCost(2e-6, 2e-6, 1e-6), SyncCost(1e-3, 1e-3)):
        for _ in range(25):
            graph = program_graph(rng, 18, 14)
            made = gated(graph, sync)
            assert simulate(graph, made, sync) <= simulate(graph, assign(graph, "serial"), sync) + 1e-12
            assert set(graph.edges) <= reachable(18, [*stream_edges(made.streams), *made.waits])


def test_the_gate_takes_branches_that_pay_and_leaves_those_that_do_not() -> None:
    long, short = 100e-6, 1e-6
    graph = fan([long, long, short])
    made = gated(graph, SyncCost(fork=2e-6, join=2e-6))
    apart = {made.streams[1], made.streams[2]}
    assert len(apart) == 2
    assert made.num_streams == 2  # the short one is not worth a wait
    assert gated(graph, SyncCost(fork=1e-3, join=1e-3)).num_streams == 1
    assert gated(fan([long, long], share=1.0), SyncCost(1e-6, 1e-6)).num_streams == 1


def test_candidates_are_distinct_and_begin_with_one_stream() -> None:
    chain = TaskGraph.of(5, [(i, i + 1) for i in range(4)])
    (only,) = candidates(chain)
    assert only.name == "serial"
    assert only.assignment == Assignment((0,) * 5, ())
    graph = fan([1e-4, 1e-4, 1e-6])
    names = [c.name for c in candidates(graph, SyncCost(2e-6, 2e-6))]
    assert names == ["serial", "gated", "full"]
    tasks = tuple(replace(task, seconds=1e-4 * bool(task.seconds)) for task in graph.tasks)
    same = candidates(TaskGraph(tasks, graph.edges), FREE)
    assert [c.name for c in same] == ["serial", "gated"]  # full concurrency is what the gate chose
    assert same[1].seconds < same[0].seconds
