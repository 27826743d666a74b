"""What a sequence gives back, and as what the cache keeps it: while it grows, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtool.core.memory.geometry import STATES
from llmtool.core.memory.prefix_cache import TAIL
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.retention import ANSWER, END, PROMPT, TRUNK, WAY
from llmtool.core.memory.sequence_pages import SequencePages
from llmtool.core.memory.tables import Table

if TYPE_CHECKING:
    from llmtool.core.memory.two_level import TwoLevelAllocator

REACHING = (*STATES, "sliding_window", "chunked")  # kinds whose layers leave behind what came before


def settle(a: TwoLevelAllocator, state: SequencePages) -> None:
    """The steps that wrote and read this sequence's pages are submitted: name its states, and give up what
    the next token does not read."""
    if state.names:
        a._states.name(state)
    if state.stale:
        for page in state.stale:
            a.cache.release(page, state, 0, TRUNK)
        state.stale.clear()
    whole = state.known // a.block * a.block  # pages of a block stay until it is hashed
    for tables in a._reaching:
        t = tables[0]  # of one type, and so all alike
        first = min(t.first_live(state.known), whole) // t.tokens
        if first > state.first[t.group]:
            first = min(first, len(state.tables[t.group]))
            for t in tables:
                _give_up(a, state, t, first)
    if state.superseded:
        a._states.renew(state)


def _give_up(a: TwoLevelAllocator, state: SequencePages, t: Table, first: int) -> None:
    table, release, after = state.tables[t.group], a.cache.release, state.prompt + t.tokens
    for i in range(state.first[t.group], first):
        page, table[i] = table[i], NONE
        end = (i + 1) * t.tokens
        if t.is_state:
            if table[i + 1] != page:
                kind, high = a._states.purpose(state, end // a.block)
                release(page, state, end, kind, high)
                if kind == PROMPT:
                    state.left.append((page, (end - 1) // a.block))
        elif end < after and _near_prompt(a, state, t, end):
            release(page, state, end, PROMPT)
            state.left.append((page, (end - 1) // a.block))
        else:
            release(page, state, end, WAY, a.cache.way_level(t, end))
    state.first[t.group] = first


def _near_prompt(a: TwoLevelAllocator, state: SequencePages, t: Table, end: int) -> bool:
    """Does a page of a window that ends at token `end` serve those that part near the prompt's end, or at a
    hint? The next prompt may share what came before the question."""
    if end >= state.prompt + t.tokens:
        return False
    if t.first_live(state.prompt) - TAIL < end:
        return True
    points = (blocks * a.block for blocks in state.dear)
    return any(t.first_live(point) < end < point + t.tokens for point in points)


def drop(a: TwoLevelAllocator, state: SequencePages, over: bool) -> None:
    """Give all pages back, the deepest first. over: a conversation may go on from here, else this sequence."""
    if state.host is not None:
        drop_host(a, state)
        return
    cache = a.cache
    cache.clock += 1
    when = cache.clock  # the same for all, so that the deepest goes first in every type
    a._states.name(state)
    for t in a.tables:
        table, first = state.tables[t.group], state.first[t.group]
        for i in range(len(table) - 1, first - 1, -1):
            if i == first or table[i - 1] != table[i]:
                end = (i + 1) * t.tokens
                cache.release(table[i], state, end, _last_purpose(a, state, t, end, over), 0, when)
        state.tables[t.group], state.first[t.group] = [], 0
    for page in state.stale:
        cache.release(page, state, 0, TRUNK)
    state.stale.clear()
    if not a.prefix_caching:
        return
    a._states.renew(state)
    cache.freshen(state, [at for at in state.left if at[1] < len(state.hashes)], PROMPT, when)
    cache.freshen(state, a._states.last(state), ANSWER, when)
    if over and state.registered and state.known + a.block >= state.prompt:
        cache.mark(state.hashes[state.registered - 1], ANSWER)


def _last_purpose(a: TwoLevelAllocator, state: SequencePages, t: Table, end: int, over: bool) -> int:
    """What the pages are kept for that a sequence holds to its end."""
    if not over:
        return TRUNK
    if t.spec.kind not in REACHING:
        # What one prompt has to itself is read by those that go on near its end, and by no others.
        return END if 0 < state.parted * a.block < end else TRUNK
    if t.is_state:
        return a._states.purpose(state, end // a.block)[0]
    return END if _near_prompt(a, state, t, end) else ANSWER


def drop_host(a: TwoLevelAllocator, state: SequencePages) -> None:
    assert state.host is not None and a._host is not None
    for slots in state.host:
        for slot in slots:
            a._host.release(slot, 0, keep=False)
    state.host = None
