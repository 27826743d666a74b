"""Which task runs in which stream, and where streams wait for each other. No torch.

At maximum logical concurrency two tasks share a stream only if one reaches the other, so a stream is a chain of
the reachability order (Nimble 4.2). A chain spares the synchronisation of each edge of the minimum equivalent graph
(MEG) that it runs along, and of no other; so the fewest are |MEG| - |maximum matching on it|.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from llmtool.runtime.aot.order import Order, members, order, scheduled
from llmtool.runtime.aot.tasks import Edge, TaskGraph

MODES = ("exact", "edges", "paper", "code", "serial")


@dataclass(frozen=True, slots=True)
class Assignment:
    """streams: one per task, numbered from 0 in order of first use; tasks of a stream run by number.
    waits: (earlier task, later task) in different streams: the later one's stream waits for the earlier one."""

    streams: tuple[int, ...]
    waits: tuple[Edge, ...]

    @property
    def num_streams(self) -> int:
        return len(set(self.streams))

    @property
    def synchronisations(self) -> int:
        return len(self.waits)


def assign(graph: TaskGraph, mode: str = "exact") -> Assignment:
    """Streams for a graph.

    exact: fewest synchronisations, then fewest streams; for streams that run as they are.
    edges: fewest synchronisations and no order between tasks beyond the MEG, which is what is left of streams
        when they are captured into a CUDA graph; more streams, which cost nothing there.
    paper: Nimble's algorithm 1. code: its released code, which takes those streams but waits for every parent in
        another stream. serial: one stream.
    """
    assert mode in MODES, mode
    if mode == "serial":
        return Assignment((0,) * len(graph), ())
    whole = order(len(graph), graph.edges)
    if mode == "exact":
        return with_waits(graph, chains(len(graph), closure_matching(whole)))
    streams = chains(len(graph), meg_matching(whole))
    if mode == "code":
        crossing = [(u, v) for u, v in graph.edges if streams[u] != streams[v]]
        return Assignment(streams, tuple(crossing))
    return with_waits(graph, streams)


def with_waits(graph: TaskGraph, streams: Sequence[int]) -> Assignment:
    """Any streams, with the fewest waits that keep the graph's order and hold up no task by one it does not depend
    on: MEG edges of what is then scheduled that cross. The streams' own order counts: what it implies is not waited
    for again."""
    meg = scheduled(len(graph), graph.edges, streams).meg
    return Assignment(tuple(streams), tuple((u, v) for u, v in meg if streams[u] != streams[v]))


def width(whole: Order) -> int:
    """The most tasks that can run at once: the largest antichain, by Dilworth the fewest chains that cover."""
    after = [list(members(bits)) for bits in whole.after]
    return len(whole) - len(maximum_matching(len(whole), after))


# -- matchings -------------------------------------------------------------------------------------------------


def meg_matching(whole: Order) -> dict[int, int]:
    """Task -> the next of its chain: a maximum matching on the MEG."""
    children: list[list[int]] = [[] for _ in range(len(whole))]
    for u, v in whole.meg:
        children[u].append(v)
    return maximum_matching(len(whole), children)


def maximum_matching(n: int, neighbours: Sequence[Sequence[int]]) -> dict[int, int]:
    """Left node -> right node, as many pairs as there can be (Hopcroft-Karp). neighbours: of each left node."""
    to_right: list[int | None] = [None] * n
    to_left: list[int | None] = [None] * n
    while True:
        level = _levels(neighbours, to_right, to_left)
        if level is None:
            return {u: v for u, v in enumerate(to_right) if v is not None}
        at = [0] * n
        for u in range(n):
            if to_right[u] is None:
                _augment(u, neighbours, to_right, to_left, level, at)


def _levels(
    neighbours: Sequence[Sequence[int]], to_right: Sequence[int | None], to_left: Sequence[int | None]
) -> list[int] | None:
    """Distances of left nodes from the free ones along alternating paths; None if no path ends free."""
    level = [0 if v is None else -1 for v in to_right]
    queue = deque(u for u, v in enumerate(to_right) if v is None)
    found = False
    while queue:
        u = queue.popleft()
        for v in neighbours[u]:
            w = to_left[v]
            if w is None:
                found = True
            elif level[w] < 0:
                level[w] = level[u] + 1
                queue.append(w)
    return level if found else None


def _augment(
    root: int,
    neighbours: Sequence[Sequence[int]],
    to_right: list[int | None],
    to_left: list[int | None],
    level: list[int],
    at: list[int],
) -> None:
    """Turn one shortest augmenting path from a free left node, if there is one. Iterative: paths are long."""
    path: list[Edge] = []
    u = root
    while True:
        if at[u] == len(neighbours[u]):
            if not path:
                return
            u, _ = path.pop()
            at[u] += 1
            continue
        v = neighbours[u][at[u]]
        w = to_left[v]
        if w is None:
            for a, b in [*path, (u, v)]:
                to_right[a], to_left[b] = b, a
            return
        if level[w] == level[u] + 1:
            path.append((u, v))
            u = w
        else:
            at[u] += 1


def closure_matching(whole: Order) -> dict[int, int]:
    """Task -> the next of its chain: along as many MEG edges as can be, then along as many pairs of the closure.

    A maximum-weight matching with weight n + 1 on MEG edges and 1 on the other pairs. An edge whose ends have no
    other MEG edge on that side is in every optimum, since what it could give way to is two pairs of weight 1; so
    runs of such edges are taken as given, and the assignment problem is as large as what is left.
    """
    n = len(whole)
    outs, ins = [0] * n, [0] * n
    for u, v in whole.meg:
        outs[u] += 1
        ins[v] += 1
    fixed = {u: v for u, v in whole.meg if outs[u] == 1 and ins[v] == 1}
    taken = set(fixed.values())
    left = [u for u in range(n) if u not in fixed and whole.after[u]]
    right = [v for v in range(n) if v not in taken and whole.before[v]]
    if not left or not right:
        return fixed
    column = {v: j for j, v in enumerate(right)}
    weight = np.zeros((len(left), len(right)))
    for i, u in enumerate(left):
        weight[i, [column[v] for v in members(whole.after[u]) if v in column]] = 1
    row = {u: i for i, u in enumerate(left)}
    for u, v in whole.meg:
        if u in row and v in column:
            weight[row[u], column[v]] = n + 1
    rows, columns = linear_sum_assignment(weight, maximize=True)
    chosen = {
        left[i]: right[j] for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if weight[i, j] > 0
    }
    return fixed | chosen


def chains(n: int, following: dict[int, int]) -> tuple[int, ...]:
    """The stream of each task when `following` is the next of its chain."""
    streams = [-1] * n
    count = 0
    for first in range(n):
        if streams[first] < 0:
            task: int | None = first
            while task is not None:
                assert streams[task] < 0
                streams[task] = count
                task = following.get(task)
            count += 1
    return tuple(streams)


def renumbered(streams: Iterable[int]) -> tuple[int, ...]:
    """The same streams, numbered in order of first use."""
    names: dict[int, int] = {}
    return tuple(names.setdefault(stream, len(names)) for stream in streams)
