"""Sequences moved to host memory and back. The host's arena has the device's page plan, so a page goes as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtool.core.memory import two_level_release as release
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.sequence_pages import SequencePages
from llmtool.core.memory.tables import Table
from llmtool.core.ports import PageCopy

if TYPE_CHECKING:
    from llmtool.core.memory.two_level import TwoLevelAllocator


def swap_out(a: TwoLevelAllocator, seq: str) -> list[PageCopy] | None:
    state = a._seqs[seq]
    assert state.host is None
    release.settle(a, state)
    wants = [0] * len(a.arena.types)
    for t in a.tables:
        wants[t.kind] += len(_distinct(state, t))
    if a._host is None or not a._host.fits(wants):
        return None
    taken = [iter(pages) for pages in a._host.take(wants, seq).pages]
    copies: list[PageCopy] = []
    host: list[list[int]] = []
    shapes = [(len(table), first) for table, first in zip(state.tables, state.first, strict=True)]
    for t in a.tables:
        pages = _distinct(state, t)
        slots = [next(taken[t.kind]) for _ in pages]
        pairs = zip(pages, slots, strict=True)
        copies += [PageCopy(a.arena.entry(p), a._host.entry(slot), t.group) for p, slot in pairs]
        host.append(slots)
    release.drop(a, state, over=False)
    state.host, state.room, state.cow = host, 0, False
    for t, (length, first) in zip(a.tables, shapes, strict=True):
        state.tables[t.group], state.first[t.group] = [NONE] * length, first
    return copies


def _distinct(state: SequencePages, t: Table) -> list[int]:
    table = state.tables[t.group]
    return table[-1:] if t.is_state else table[state.first[t.group] :]


def swap_in(a: TwoLevelAllocator, seq: str, target: int) -> list[PageCopy]:
    state = a._seqs[seq]
    assert state.host is not None and a._host is not None
    ends = [max(len(state.tables[t.group]), -(-target // t.tokens)) for t in a.tables]
    wants = [0] * len(a.arena.types)
    for t in a.tables:
        wants[t.kind] += 1 if t.is_state else ends[t.group] - state.first[t.group]
    if not a.arena.fits(wants):
        a._refuse(wants, a.arena.large_needed(wants))
    pages = a.cache.take(seq, wants)
    copies: list[PageCopy] = []
    for t, slots in zip(a.tables, state.host, strict=True):
        first, end = state.first[t.group], ends[t.group]
        own = [next(pages[t.kind]) for _ in range(1 if t.is_state else end - first)]
        state.tables[t.group] = [NONE] * first + own * (end - first if t.is_state else 1)
        copies += [
            PageCopy(a._host.entry(slot), a.arena.entry(page), t.group)
            for slot, page in zip(slots, own, strict=False)  # those that follow are empty yet
        ]
    release.drop_host(a, state)
    state.length = max(state.length, target)
    return copies
