"""Assignments to streams, against every assignment there is."""

import random
from itertools import combinations

import pytest

from llmtool.runtime.aot.order import order, scheduled
from llmtool.runtime.aot.streams import (
    Assignment,
    assign,
    chains,
    closure_matching,
    maximum_matching,
    width,
    with_waits,
)
from llmtool.runtime.aot.tasks import TaskGraph
from tests.runtime.aot.graphs import (
    chain_partitions,
    fewest_waits,
    program_graph,
    random_dag,
    reachable,
    stream_edges,
)


def best_by_trying(graph: TaskGraph) -> tuple[int, int]:
    """(synchronisations, streams), the least of all assignments at maximal concurrency."""
    return min(
        (with_waits(graph, streams).synchronisations, len(set(streams)))
        for streams in chain_partitions(graph)
    )


def concurrent(graph: TaskGraph, assignment: Assignment) -> bool:
    """Whether no two tasks that could run at once share a stream."""
    reach = reachable(len(graph), graph.edges)
    return all(
        (a, b) in reach
        for a, b in combinations(range(len(graph)), 2)
        if assignment.streams[a] == assignment.streams[b]
    )


def test_exact_is_the_optimum() -> None:
    rng = random.Random(1)
    for _ in range(200):
        graph = random_dag(rng, rng.randrange(1, 8))
        ours = assign(graph, "exact")
        assert concurrent(graph, ours)
        assert (ours.synchronisations, ours.num_streams) == best_by_trying(graph)


def test_waits_are_the_fewest_of_any_pairs() -> None:
    """Not only of those along edges, and for any streams, which the gate makes too."""
    rng = random.Random(2)
    for _ in range(60):
        graph = random_dag(rng, 5)
        streams = [rng.randrange(3) for _ in range(5)]
        assert with_waits(graph, streams).synchronisations == fewest_waits(graph, streams)


def test_papers_assignment_and_its_codes() -> None:
    rng = random.Random(3)
    more_waits = more_streams = 0
    for _ in range(300):
        graph = random_dag(rng, rng.randrange(6, 13))
        whole = order(len(graph), graph.edges)
        ours, paper, code = (assign(graph, mode) for mode in ("exact", "paper", "code"))
        matched = max_matching_by_trying(len(graph), whole.meg)
        assert concurrent(graph, paper)
        # Its theorem: the fewest synchronisations are |MEG| - |M|; ours are as few.
        assert paper.synchronisations == len(whole.meg) - matched == ours.synchronisations
        assert paper.num_streams == len(graph) - matched
        assert code.streams == paper.streams
        assert code.synchronisations == sum(paper.streams[u] != paper.streams[v] for u, v in graph.edges)
        more_waits += code.synchronisations > paper.synchronisations
        more_streams += paper.num_streams > ours.num_streams
    # What the design says of both: the code waits more than it must, and the streams are not minimal.
    assert more_waits > 30
    assert more_streams > 0


def max_matching_by_trying(n: int, edges: tuple[tuple[int, int], ...]) -> int:
    def grow(at: int, left: int, right: int) -> int:
        if at == len(edges):
            return 0
        u, v = edges[at]
        best = grow(at + 1, left, right)
        if not left >> u & 1 and not right >> v & 1:
            best = max(best, 1 + grow(at + 1, left | 1 << u, right | 1 << v))
        return best

    return grow(0, 0, 0) if len(edges) <= 14 else len(maximum_matching_simple(n, edges))


def maximum_matching_simple(n: int, edges: tuple[tuple[int, int], ...]) -> dict[int, int]:
    """Kuhn's augmenting paths."""
    owner: dict[int, int] = {}

    def find(u: int, seen: set[int]) -> bool:
        for a, v in edges:
            if a == u and v not in seen:
                seen.add(v)
                if v not in owner or find(owner[v], seen):
                    owner[v] = u
                    return True
        return False

    for u in range(n):
        find(u, set())
    return owner


def test_matching_is_maximum() -> None:
    rng = random.Random(4)
    for _ in range(200):
        n = rng.randrange(1, 30)
        edges = tuple((u, v) for u in range(n) for v in range(n) if rng.random() < 3 / n)
        found = maximum_matching(n, [[v for u, v in edges if u == a] for a in range(n)])
        assert len(set(found.values())) == len(found)
        assert all(pair in edges for pair in found.items())
        assert len(found) == len(maximum_matching_simple(n, edges))


def test_width_is_the_largest_antichain() -> None:
    rng = random.Random(5)
    for _ in range(100):
        graph = random_dag(rng, 9)
        reach = reachable(9, graph.edges)
        largest = max(
            k
            for k in range(1, 10)
            for nodes in combinations(range(9), k)
            if all(pair not in reach for pair in combinations(nodes, 2))
        )
        assert width(order(9, graph.edges)) == largest


@pytest.mark.parametrize("mode", ["exact", "edges", "paper", "code", "serial"])
def test_waits_enforce_every_edge(mode: str) -> None:
    rng = random.Random(6)
    for _ in range(80):
        graph = program_graph(rng, 16, 12)
        made = assign(graph, mode)
        assert set(graph.edges) <= reachable(16, [*stream_edges(made.streams), *made.waits])
        assert all(made.streams[u] != made.streams[v] for u, v in made.waits)


def test_captured_edges_are_those_of_the_minimum_equivalent_graph() -> None:
    rng = random.Random(7)
    for _ in range(80):
        graph = random_dag(rng, 12)
        made = assign(graph, "edges")
        edges = {*stream_edges(made.streams), *made.waits}
        assert edges == set(order(12, graph.edges).meg)


def test_contracted_runs_change_nothing() -> None:
    """Long runs between branches are taken as given before the assignment problem is solved."""
    rng = random.Random(8)
    for _ in range(40):
        graph = random_dag(rng, 5)
        # Each node becomes a run of three.
        edges = [(3 * u + 2, 3 * v) for u, v in graph.edges]
        edges += [(3 * u + i, 3 * u + i + 1) for u in range(5) for i in range(2)]
        long = TaskGraph.of(15, edges)
        short, ours = assign(graph, "exact"), assign(long, "exact")
        assert (ours.synchronisations, ours.num_streams) == (short.synchronisations, short.num_streams)


def test_six_hundred_tasks() -> None:
    """The size of a large net, without its runs: the assignment problem has hundreds of rows."""
    rng = random.Random(9)
    edges = {(rng.randrange(max(0, v - 40), v), v) for v in range(1, 600) for _ in range(2)}
    graph = TaskGraph.of(600, edges)
    ours, paper = assign(graph, "exact"), assign(graph, "paper")
    whole = order(600, graph.edges)
    assert ours.synchronisations == paper.synchronisations
    assert width(whole) <= ours.num_streams <= paper.num_streams
    assert (
        scheduled(600, graph.edges, ours.streams).after == whole.after
    )  # nothing runs in turn that need not
    assert ours.streams == chains(600, closure_matching(whole))


def test_no_task_and_one_task() -> None:
    for mode in ("exact", "edges", "paper", "code", "serial"):
        assert assign(TaskGraph.of(0, ()), mode).num_streams == 0
        assert assign(TaskGraph.of(1, ()), mode) == Assignment((0,), ())
