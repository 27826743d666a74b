"""How long a schedule takes, and which side branches pay for their streams. No torch.

A task runs at its measured speed while the shares of the device that run beside it leave room, and all slow down
alike when they do not; a wait between streams costs both sides. A model on paper: it proposes schedules, and the
executor measures them and keeps the fastest, one stream among them, so no branch of a schedule is slower for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from llmtool.runtime.aot.order import order
from llmtool.runtime.aot.streams import Assignment, assign, renumbered, with_waits
from llmtool.runtime.aot.tasks import TaskGraph


@dataclass(frozen=True, slots=True)
class SyncCost:
    """Seconds: fork, that a task is held up by whoever waits for it elsewhere; join, that a task starts later for
    each wait; launch, between two tasks of a stream."""

    fork: float = 0.0
    join: float = 0.0
    launch: float = 0.0


MOST = 64  # chains that the gate tries
# Assumed for the edges of a captured graph until they are measured (benchmarks/aot_h200.py does).
GRAPH_COST = SyncCost(fork=0.6e-6, join=1.2e-6, launch=0.9e-6)


def simulate(graph: TaskGraph, assignment: Assignment, sync: SyncCost) -> float:
    """Seconds until the last task ends, each stream running its tasks by number. O((tasks + waits) * streams)."""
    n = len(graph)
    children: list[list[int]] = [[] for _ in range(n)]
    missing, joins, forks = [0] * n, [0] * n, [0] * n
    for u, v in assignment.waits:
        children[u].append(v)
        missing[v] += 1
        joins[v] += 1
        forks[u] = 1
    last: dict[int, int] = {}
    for v, stream in enumerate(assignment.streams):
        if stream in last:
            children[last[stream]].append(v)
            missing[v] += 1
        last[stream] = v
    # Overheads hold up a stream and take nothing of the device: first they pass, then the task runs.
    delayed: list[tuple[float, int]] = []
    for v in range(n):
        if not missing[v]:
            heapq.heappush(delayed, (sync.launch, v))
    left: dict[int, float] = {}
    now = 0.0
    while delayed or left:
        used = sum(graph.tasks[v].share for v in left)
        rate = 1.0 if used <= 1 else 1 / used
        first_end = min(left.values()) / rate if left else float("inf")
        first_start = delayed[0][0] - now if delayed else float("inf")
        step = max(0.0, min(first_end, first_start))
        now += step
        ended = [v for v, rest in left.items() if rest - step * rate <= 1e-15]
        for v in left:
            left[v] -= step * rate
        if first_start <= first_end:
            _, v = heapq.heappop(delayed)
            left[v] = graph.tasks[v].seconds + sync.fork * forks[v]
        for v in ended:
            del left[v]
            for w in children[v]:
                missing[w] -= 1
                if not missing[w]:
                    heapq.heappush(delayed, (now + sync.launch + sync.join * joins[w], w))
    return now


def gated(graph: TaskGraph, sync: SyncCost, full: Assignment | None = None, limit: int = 8) -> Assignment:
    """One stream, and those chains of `full` beside it whose streams pay.

    Chains are tried from the longest; one is kept apart where that shortens the simulated time by more than a
    hundredth of what it takes, in a side stream that has nothing it could run beside, or else in a new one.
    limit: streams at most. The MOST longest chains are tried, a simulation each.
    """
    full = full or assign(graph, "exact")
    whole = order(len(graph), graph.edges)
    length: dict[int, float] = {}
    tasks_of: dict[int, int] = {}
    ordered: dict[int, int] = {}  # chain -> the tasks that are ordered with all of it
    for i, stream in enumerate(full.streams):
        length[stream] = length.get(stream, 0.0) + graph.tasks[i].seconds
        tasks_of[stream] = tasks_of.get(stream, 0) | 1 << i
        ordered[stream] = ordered.get(stream, -1) & (whole.after[i] | whole.before[i] | 1 << i)
    by_length = sorted(length, key=lambda s: (-length[s], s))
    place = dict.fromkeys(by_length, 0)
    side = [0]  # tasks in each side stream; the first is not looked at
    best = _placed(graph, full.streams, place)
    seconds = simulate(graph, best, sync)
    for chain in [c for c in by_length[1:] if length[c] > sync.join][:MOST]:
        stream = next((s for s in range(1, len(side)) if not side[s] & ~ordered[chain]), len(side))
        if stream >= limit:
            continue
        tried = _placed(graph, full.streams, {**place, chain: stream})
        took = simulate(graph, tried, sync)
        if took < seconds - 0.01 * length[chain]:
            place, best, seconds = {**place, chain: stream}, tried, took
            side += [0] * (stream == len(side))
            side[stream] |= tasks_of[chain]
    return Assignment(renumbered(best.streams), best.waits)


def _placed(graph: TaskGraph, chains: Sequence[int], place: dict[int, int]) -> Assignment:
    return with_waits(graph, [place[chain] for chain in chains])


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule to be measured. name: serial, gated or full. seconds: predicted."""

    name: str
    assignment: Assignment
    seconds: float


def candidates(graph: TaskGraph, sync: SyncCost = GRAPH_COST, captured: bool = True) -> list[Candidate]:
    """One stream, the gated schedule, full concurrency; those that are the same only once, under the first name.

    captured: streams become edges of a CUDA graph, so the fewest edges count, not the fewest streams.
    """
    full = assign(graph, "edges" if captured else "exact")
    made = {
        "serial": assign(graph, "serial"),
        "gated": gated(graph, sync, assign(graph, "exact")),
        "full": full,
    }
    kept: dict[tuple[int, ...], Candidate] = {}
    for name, assignment in made.items():
        streams = renumbered(assignment.streams)
        if streams not in kept:
            kept[streams] = Candidate(name, assignment, simulate(graph, assignment, sync))
    return list(kept.values())
