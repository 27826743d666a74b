"""The two-level allocator's accounts: what its bytes hold, what a sequence costs, and that everything adds up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtool.core.memory.allocator import Ledger
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.sequence_pages import SequencePages

if TYPE_CHECKING:
    from llmtool.core.memory.two_level import TwoLevelAllocator


def _filled(a: TwoLevelAllocator, state: SequencePages) -> Iterator[tuple[int, int, int]]:
    """(page, table, bytes of it that are written) of all live pages."""
    for t in a.tables:
        group, table, first = a.groups[t.group], state.tables[t.group], state.first[t.group]
        if t.is_state:
            for page in dict.fromkeys(table[first:]):
                yield page, t.group, group.payload_bytes
            continue
        for i in range(first, len(table)):
            slots = max(0, min(t.tokens, state.length - i * t.tokens))
            yield table[i], t.group, slots * group.bytes_per_token


def ledger(a: TwoLevelAllocator) -> Ledger:
    filled: dict[int, tuple[int, int]] = {}  # page -> table, bytes
    for state in a._seqs.values():
        if state.host is not None:
            continue
        for page, group, size in _filled(a, state):
            filled[page] = (group, max(size, filled.get(page, (group, 0))[1]))
        for page in state.stale:
            filled.setdefault(page, (_table_of(a, page), 0))
    tokens = sum(size for _, size in filled.values())
    tail = sum(a.groups[g].payload_bytes - size for g, size in filled.values())
    parts = a.arena.ledger()
    shared = sum(a.arena.references(page) > 1 for page in filled)
    used, cached = a.usage()
    return Ledger(
        arena=a.num_pages * a.plan.large_page,
        tokens=tokens,
        tail=tail,
        cached=parts["evictable"],
        padding=parts["padding"] + parts["used"] - tokens - tail,
        free=parts["free"] + parts["empty"],
        pages_total=a.num_pages,
        pages_used=used,
        pages_cached=cached,
        pages_shared=shared,
    )


def _table_of(a: TwoLevelAllocator, page: int) -> int:
    kind = a.arena.kind_of(page)
    return next(t.group for t in a.tables if t.kind == kind)


def bill(a: TwoLevelAllocator, seq: str) -> dict[str, int]:
    state = a._seqs[seq]
    bill = dict.fromkeys(("tokens", "tail", "padding", "shared"), 0)
    for page, g, size in () if state.host is not None else _filled(a, state):
        group = a.groups[g]
        bill["tokens"] += size
        bill["tail"] += group.payload_bytes - size
        bill["padding"] += group.page_bytes - group.payload_bytes
        bill["shared"] += group.page_bytes * (a.arena.references(page) > 1)
    return bill


def check(a: TwoLevelAllocator) -> None:
    a.arena.check()
    a.cache.index.check()
    held: dict[int, int] = {}
    host = 0
    for state in a._seqs.values():
        assert len(state.hashes) >= state.registered
        if state.host is not None:
            host += sum(map(len, state.host))
            continue
        for t in a.tables:
            table, first = state.tables[t.group], state.first[t.group]
            assert len(table) == -(-state.length // t.tokens), "table length"
            assert all(page == NONE for page in table[:first])
            assert NONE not in table[first:], "a hole in what is read"
            assert first * t.tokens <= t.first_live(state.length) or not table
        for page in state.held():
            held[page] = held.get(page, 0) + 1
    for page in range(a.num_pages * a.arena.width):
        assert a.arena.references(page) == held.get(page, 0), "reference counts"
    for page in a.cache.index.pages():
        assert a.arena.is_evictable(page) or page in held, "a named page without content"
    evictable = a.arena.num_evictable()
    assert evictable == sum(page not in held for page in a.cache.index.pages()), "evictable has a name"
    if a._host is not None:
        a._host.check()
    books = ledger(a)
    parts = (books.tokens, books.tail, books.cached, books.padding, books.free)
    assert min(parts) >= 0 and sum(parts) == books.arena, "ledger"
