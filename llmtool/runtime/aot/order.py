"""Partial orders of tasks as bit sets: Python ints, bit j of entry i for the pair (i, j). No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmtool.runtime.aot.tasks import Edge

Bits = int


@dataclass(frozen=True, slots=True)
class Order:
    """The reachability order of a DAG whose nodes are numbered topologically.

    after[i], before[i]: the nodes that i reaches, and that reach it, without itself. meg: the edges of the minimum
    equivalent graph (transitive reduction), the fewest that have this order; for a DAG they are unique.
    """

    after: tuple[Bits, ...]
    before: tuple[Bits, ...]
    meg: tuple[Edge, ...]

    def __len__(self) -> int:
        return len(self.after)

    def precedes(self, u: int, v: int) -> bool:
        return bool(self.after[u] >> v & 1)


def order(n: int, edges: Iterable[Edge]) -> Order:
    """The order of n nodes with edges (u, v), u < v. O(edges) operations on n-bit sets."""
    children: list[list[int]] = [[] for _ in range(n)]
    for u, v in edges:
        assert 0 <= u < v < n
        children[u].append(v)
    after = [0] * n
    meg: list[Edge] = []
    for u in range(n - 1, -1, -1):
        seen = 0
        # Nearest first: a child that an earlier one reaches is none of the minimum.
        for v in sorted(set(children[u])):
            if not seen >> v & 1:
                meg.append((u, v))
                seen |= after[v] | 1 << v
        after[u] = seen
    before = [0] * n
    for u in range(n):
        for v in children[u]:
            before[v] |= before[u] | 1 << u
    return Order(tuple(after), tuple(before), tuple(sorted(meg)))


def members(bits: Bits) -> Iterator[int]:
    """The numbers of the bits that are set, ascending."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def scheduled(n: int, edges: Iterable[Edge], streams: Sequence[int]) -> Order:
    """The order when tasks of the same stream also run one after the other, by number. streams: one per task."""
    last: dict[int, int] = {}
    more: list[Edge] = []
    for task, stream in enumerate(streams):
        if stream in last:
            more.append((last[stream], task))
        last[stream] = task
    return order(n, [*edges, *more])
