"""Random task graphs, and brute-force answers about them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from llmtool.runtime.aot.tasks import Edge, Task, TaskGraph, dependencies


def random_dag(rng: random.Random, n: int) -> TaskGraph:
    density = rng.choice((0.15, 0.3, 0.5))
    return TaskGraph.of(n, (e for e in combinations(range(n), 2) if rng.random() < density))


def random_program(rng: random.Random, n: int, buffers: int) -> list[Task]:
    """Tasks that read what was written before and write new or old buffers, in place too."""
    written: list[int] = []
    tasks = []
    for i in range(n):
        reads = frozenset(rng.sample(written, min(len(written), rng.randrange(3))))
        target = rng.choice(written) if written and rng.random() < 0.2 else len(set(written))
        target = min(target, buffers - 1)
        tasks.append(
            Task(f"t{i}", reads, frozenset({target}), rng.random() * 1e-5, rng.choice((0.2, 0.5, 1.0)))
        )
        written.append(target)
    return tasks


def reachable(n: int, edges: Sequence[Edge]) -> set[Edge]:
    """Floyd and Warshall."""
    reach = set(edges)
    for k in range(n):
        reach |= {(a, d) for a, b in reach if b == k for c, d in reach if c == k}
    return reach


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to split items into sets."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def chain_partitions(graph: TaskGraph) -> Iterator[tuple[int, ...]]:
    """Every assignment to streams at maximal concurrency."""
    reach = reachable(len(graph), graph.edges)
    for parts in partitions(range(len(graph))):
        if all((a, b) in reach for part in parts for a, b in combinations(sorted(part), 2)):
            streams = [0] * len(graph)
            for s, part in enumerate(parts):
                for task in part:
                    streams[task] = s
            yield tuple(streams)


def stream_edges(streams: Sequence[int]) -> list[Edge]:
    return [
        pair
        for stream in set(streams)
        for pair in pairwise(task for task, s in enumerate(streams) if s == stream)
    ]


def fewest_waits(graph: TaskGraph, streams: Sequence[int]) -> int:
    """The smallest set of waits between streams, of any pairs of tasks, that enforces every edge and holds up no
    task by one it does not depend on: by trying all."""
    n = len(graph)
    own = stream_edges(streams)
    pairs = [(u, v) for u, v in sorted(reachable(n, [*graph.edges, *own])) if streams[u] != streams[v]]
    for count in range(len(pairs) + 1):
        for waits in combinations(pairs, count):
            if set(graph.edges) <= reachable(n, [*own, *waits]):
                return count
    raise AssertionError("all pairs together enforce everything")


def linear_extension(rng: random.Random, n: int, edges: Sequence[Edge]) -> list[int]:
    """A random order of the tasks that breaks no edge."""
    missing = [0] * n
    children: list[list[int]] = [[] for _ in range(n)]
    for u, v in edges:
        missing[v] += 1
        children[u].append(v)
    ready, out = [i for i in range(n) if not missing[i]], []
    while ready:
        task = ready.pop(rng.randrange(len(ready)))
        out.append(task)
        for child in children[task]:
            missing[child] -= 1
            if not missing[child]:
                ready.append(child)
    return out


def program_graph(rng: random.Random, n: int, buffers: int) -> TaskGraph:
    return dependencies(random_program(rng, n, buffers))
