"""Closures, minimum equivalent graphs and dependencies, against definitions tried out."""

import random

from llmtool.runtime.aot.order import members, order, scheduled
from llmtool.runtime.aot.tasks import Task, dependencies
from tests.runtime.aot.graphs import linear_extension, random_dag, random_program, reachable, stream_edges


def test_closure_and_minimum_equivalent_graph() -> None:
    rng = random.Random(1)
    for _ in range(150):
        graph = random_dag(rng, rng.randrange(1, 11))
        n, whole = len(graph), order(len(graph), graph.edges)
        reach = reachable(n, graph.edges)
        assert {(u, v) for u in range(n) for v in members(whole.after[u])} == reach
        assert {(u, v) for v in range(n) for u in members(whole.before[v])} == reach
        # The fewest edges with this reachability are those that it needs one by one.
        needed = {e for e in graph.edges if reachable(n, [f for f in graph.edges if f != e]) != reach}
        assert set(whole.meg) == needed
        assert reachable(n, whole.meg) == reach


def test_scheduled_order_has_the_streams_order_too() -> None:
    rng = random.Random(2)
    for _ in range(60):
        graph = random_dag(rng, 8)
        streams = [rng.randrange(3) for _ in range(8)]
        whole = scheduled(8, graph.edges, streams)
        expected = reachable(8, [*graph.edges, *stream_edges(streams)])
        assert {(u, v) for u in range(8) for v in members(whole.after[u])} == expected


def test_dependencies_of_reads_and_writes() -> None:
    pages, x, y = 0, 1, 2
    tasks = [
        Task("write x", writes=frozenset({x})),
        Task("attend", reads=frozenset({pages, x}), writes=frozenset({y})),
        Task("store", reads=frozenset({pages, x}), writes=frozenset({pages})),  # write after read, in place
        Task("attend again", reads=frozenset({pages}), writes=frozenset({3})),
        Task("overwrite", writes=frozenset({pages})),
    ]
    assert dependencies(tasks).edges == ((0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4))


def test_every_order_the_edges_allow_gives_program_order_results() -> None:
    """Tasks that hash what they read: any order that keeps the edges ends with the same memory, read by read."""
    rng = random.Random(3)

    def run(tasks: list[Task], turn: list[int]) -> tuple[dict[int, int], dict[int, int]]:
        memory: dict[int, int] = {}
        seen = {}
        for i in turn:
            task = tasks[i]
            seen[i] = hash(tuple((b, memory.get(b, 0)) for b in sorted(task.reads)))
            for b in task.writes:
                memory[b] = hash((i, seen[i]))
        return memory, seen

    for _ in range(150):
        tasks = random_program(rng, 14, 6)
        graph = dependencies(tasks)
        expected = run(tasks, list(range(14)))
        for _ in range(6):
            assert run(tasks, linear_extension(rng, 14, graph.edges)) == expected
