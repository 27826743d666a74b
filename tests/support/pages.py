"""Memory whose pages hold fingerprints of what was written, read back through block tables: a wrong table, a lost
copy, a page given up too early or shared by mistake shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmtool.core.memory.geometry import STATES, KVCacheGroup, LayerCacheSpec
from llmtool.core.memory.model import ModelGeometry, build, rows, states
from llmtool.core.ports import PageCopy

ROW = 128  # bytes of a token in a layer: a page of 4 tokens is a unit


def model(name: str) -> ModelGeometry:
    return build(name, *PARTS[name])


PARTS: dict[str, list[list[LayerCacheSpec]]] = {
    "full": [rows("full", 3, ROW)],
    "window": [rows("sliding_window", 3, ROW, 6)],
    "full+window": [rows("full", 1, ROW), rows("sliding_window", 5, ROW, 9)],
    "two windows": [rows("sliding_window", 2, ROW, 5), rows("sliding_window", 2, 2 * ROW, 14)],
    "full+chunked": [rows("full", 1, ROW), rows("chunked", 3, ROW, 8)],
    "full+state": [rows("full", 2, ROW), states("recurrent", 3, 1200)],
    "window+state": [rows("sliding_window", 2, ROW, 7), states("short_conv", 1, 600)],
    "state": [states("recurrent", 2, 700)],
    "three": [
        rows("full", 1, ROW),
        rows("sliding_window", 2, 2 * ROW, 6),
        states("recurrent", 2, 1000),
    ],
}


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence's part of a step: positions [start, end) of `tokens`, through these tables."""

    seq: str
    tables: Sequence[Sequence[int]]
    tokens: Sequence[int]
    start: int
    end: int


def live_from(spec: LayerCacheSpec, position: int) -> int:
    """The first position that the token at `position` reads, from the definition of each kind."""
    if spec.kind == "sliding_window":
        assert spec.window is not None
        return max(0, position - spec.window + 1)
    if spec.kind == "chunked":
        assert spec.chunk is not None
        return position - position % spec.chunk
    return 0


@dataclass(slots=True)
class PageMemory:
    groups: Sequence[KVCacheGroup]
    cells: dict[int, tuple[int, dict[int, object]]] = field(default_factory=dict)  # entry -> group, slots
    owner: dict[int, int] = field(default_factory=dict)  # unit -> entry of the page last written there

    def _page(self, group: int, entry: int) -> dict[int, object]:
        """For writing: whatever page of another size or place lay there is spoilt."""
        known = self.cells.get(entry)
        units = range(entry, entry + self.groups[group].page_units)
        if known is None or known[0] != group or any(self.owner.get(u) != entry for u in units):
            for unit in units:
                lost = self.owner.get(unit, -1)
                if lost in self.cells:
                    size = self.groups[self.cells.pop(lost)[0]].page_units
                    for other in range(lost, lost + size):
                        self.owner.pop(other, None)
            self.owner |= dict.fromkeys(units, entry)
            self.cells[entry] = (group, {})
        return self.cells[entry][1]

    def read(self, group: int, entry: int, slot: int) -> object:
        kind, slots = self.cells.get(entry, (-1, {}))
        return slots.get(slot) if kind == group else f"a page of group {kind}"

    def get(self, entries: Sequence[Sequence[int]]) -> list[list[dict[int, object]]]:
        """What lies in these pages, per group."""
        found = [[self.cells.get(entry, (g, {})) for entry in group] for g, group in enumerate(entries)]
        assert all(kind == g for g, group in enumerate(found) for kind, _ in group)
        return [[dict(slots) for _, slots in group] for group in found]

    def put(self, entries: Sequence[Sequence[int]], content: list[list[dict[int, object]]]) -> None:
        for g, (group, pages) in enumerate(zip(entries, content, strict=True)):
            for entry, slots in zip(group, pages, strict=True):
                page = self._page(g, entry)
                page.clear()
                page.update(slots)

    def copy_from(self, source: PageMemory, copies: Sequence[PageCopy]) -> None:
        content = [source.cells.get(c.src, (c.group, {})) for c in copies]
        for copy, (group, slots) in zip(copies, content, strict=True):
            target = self._page(copy.group, copy.dst)
            target.clear()
            if group == copy.group:
                target.update(slots)

    def run(self, step: Sequence[Work]) -> None:
        """One step: keys and values are written before any are read, states are read before any are written."""
        read_first: dict[int, str] = {}
        for work in step:
            for g, group in enumerate(self.groups):
                if group.layers[0].kind in STATES and work.start:
                    entry = work.tables[g][(work.start - 1) // group.tokens_per_page]
                    assert self.read(g, entry, 0) == tuple(work.tokens[: work.start]), f"{work.seq}: state"
                    read_first[entry] = work.seq
        for work in step:
            for g, group in enumerate(self.groups):
                self._write(work, g, group, read_first)
        for work in step:
            self.verify(work)

    def _write(self, work: Work, g: int, group: KVCacheGroup, read_first: dict[int, str]) -> None:
        size, table = group.tokens_per_page, work.tables[g]
        if group.layers[0].kind in STATES:
            for i in range(work.start // size, -(-work.end // size)):
                assert read_first.get(table[i], work.seq) == work.seq, "a state that another sequence reads"
                self._page(g, table[i])[0] = tuple(work.tokens[: min(work.end, (i + 1) * size)])
            return
        for p in range(work.start, work.end):
            self._page(g, table[p // size])[p % size] = (g, tuple(work.tokens[: p + 1]))

    def verify(self, work: Work) -> None:
        """Every position that the step's tokens read is there."""
        for g, group in enumerate(self.groups):
            size, spec = group.tokens_per_page, group.layers[0]
            if spec.kind in STATES:
                entry = work.tables[g][(work.end - 1) // size]
                assert self.read(g, entry, 0) == tuple(work.tokens[: work.end]), f"{work.seq}: state"
                continue
            for p in range(live_from(spec, work.start), work.end):
                found = self.read(g, work.tables[g][p // size], p % size)
                assert found == (g, tuple(work.tokens[: p + 1])), f"{work.seq}: {spec.kind} at {p}: {found}"
