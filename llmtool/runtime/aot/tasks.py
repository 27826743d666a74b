"""Task graphs: tasks in program order, and which must wait for which, from what they read and write. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Edge = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Task:
    """One call. reads, writes: ids of the buffers it touches; one it updates in place is in both.

    seconds: measured alone. share: part of the device it fills while it runs, in (0, 1].
    """

    name: str
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    seconds: float = 0.0
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """Tasks in program order, which is a topological one, and edges (earlier, later), sorted, each once."""

    tasks: tuple[Task, ...]
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        n = len(self.tasks)
        assert all(0 <= u < v < n for u, v in self.edges), "an edge runs against program order"
        assert list(self.edges) == sorted(set(self.edges))

    def __len__(self) -> int:
        return len(self.tasks)

    @staticmethod
    def of(n: int, edges: Iterable[Edge]) -> TaskGraph:
        """n nameless tasks with these edges."""
        return TaskGraph(tuple(Task(str(i)) for i in range(n)), tuple(sorted(set(edges))))


def dependencies(tasks: Sequence[Task]) -> TaskGraph:
    """The graph of tasks whose effects must be those of program order.

    A read waits for the last write (RAW); a write waits for the last write (WAW) and, where a buffer is written
    again as KV pages are, for all reads since (WAR).
    """
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    edges: set[Edge] = set()
    for i, task in enumerate(tasks):
        for buffer in task.reads | task.writes:
            if buffer in writer:
                edges.add((writer[buffer], i))
        for buffer in task.writes:
            edges |= {(reader, i) for reader in readers.get(buffer, ())}
        for buffer in task.writes:
            writer[buffer], readers[buffer] = i, []
        for buffer in task.reads - task.writes:
            readers.setdefault(buffer, []).append(i)
    return TaskGraph(tuple(tasks), tuple(sorted(edges)))
