"""Sequences that share what another has computed, and sequences taken back: copy-on-write, and wrong drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.retention import TRUNK
from llmtool.core.memory.sequence_pages import SequencePages

if TYPE_CHECKING:
    from llmtool.core.memory.two_level import TwoLevelAllocator


def can_fork(a: TwoLevelAllocator, parent: str, num_tokens: int) -> bool:
    source = a._seqs[parent]
    if source.host is not None or num_tokens > source.length:
        return False
    for t in a.tables:
        if t.is_state:
            if num_tokens != source.known:
                return False
        elif t.first_live(num_tokens) // t.tokens < source.first[t.group]:
            return False
    return True


def fork(a: TwoLevelAllocator, parent: str, child: str, token_ids: Sequence[int], num_tokens: int) -> None:
    assert child not in a._seqs and can_fork(a, parent, num_tokens)
    source = a._seqs[parent]
    state = SequencePages(token_ids, source.root, len(a.tables))
    for t in a.tables:
        table = source.tables[t.group][: -(-num_tokens // t.tokens)]
        first = min(t.first_live(num_tokens) // t.tokens, len(table))
        state.tables[t.group] = [NONE] * first + table[first:]
        state.first[t.group] = first
    for page in state.held():
        a.arena.hold(page)
    full = num_tokens // a.block
    state.hashes = source.hashes[:full]
    state.registered = min(full, source.registered)
    state.hit, state.keep, state.dear = min(full, source.hit), source.keep, source.dear
    state.length = state.known = num_tokens
    state.cow = source.cow = True
    state.room = source.room = 0
    a._seqs[child] = state


def truncate(a: TwoLevelAllocator, seq: str, num_tokens: int) -> tuple[int, ...]:
    state = a._seqs[seq]
    assert state.host is None
    if num_tokens < state.length:
        assert num_tokens >= state.known or a.can_rewind, "a state cannot be taken back"
        for t in a.tables:
            table, keep = state.tables[t.group], -(-num_tokens // t.tokens)
            assert t.is_state or state.first[t.group] <= t.first_live(num_tokens) // t.tokens
            while len(table) > max(keep, state.first[t.group]):
                page = table.pop()
                if not table or table[-1] != page:
                    a.cache.release(page, state, (len(table) + 1) * t.tokens, TRUNK)
        full = num_tokens // a.block
        del state.hashes[full:]
        state.registered = min(state.registered, full)
        state.length = num_tokens
        state.known = min(state.known, num_tokens)
        state.cow, state.room = True, 0
    return tuple(len(table) for table in state.tables)
