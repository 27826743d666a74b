"""Sequences whose KV moves to another engine, or comes from one: where it lies, by the number of tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtool.core.memory.allocator import Entries
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.tables import Table

if TYPE_CHECKING:
    from llmtool.core.memory.two_level import TwoLevelAllocator


def _span(t: Table, num_tokens: int) -> tuple[int, int]:
    """The entries of a table that the token at position `num_tokens` reads, of those before it."""
    end = -(-num_tokens // t.tokens)
    return min(t.first_live(num_tokens) // t.tokens, end - 1 if t.is_state else end), end


def lent(a: TwoLevelAllocator, seq: str, num_tokens: int) -> Entries:
    state, entry = a._seqs[seq], a.arena.entry
    found = []
    for t in a.tables:
        first, end = _span(t, num_tokens)
        assert state.host is None and first >= state.first[t.group]
        pages = state.tables[t.group][end - 1 if t.is_state else first : end]
        found.append(tuple([entry(page) for page in pages]))
    return tuple(found)


def receive(
    a: TwoLevelAllocator, seq: str, token_ids: Sequence[int], num_tokens: int, salt: str, headroom: int
) -> Entries:
    assert seq not in a._seqs and 0 < num_tokens <= len(token_ids)
    wants = [0] * len(a.arena.types)
    for t in a.tables:
        first, end = _span(t, num_tokens)
        wants[t.kind] += 1 if t.is_state else end - first
    needed = a.arena.large_needed(wants) + headroom
    if needed > a.arena.reclaimable or not a.arena.fits(wants):
        a._refuse(wants, needed)
    pages = a.cache.take(seq, wants)
    state = a._new(token_ids, salt, ())
    for t in a.tables:
        first, end = _span(t, num_tokens)
        own = [next(pages[t.kind]) for _ in range(1 if t.is_state else end - first)]
        state.tables[t.group] = [NONE] * first + own * (end - first if t.is_state else 1)
        state.first[t.group] = first
    state.length = num_tokens
    a._seqs[seq] = state
    return lent(a, seq, num_tokens)
