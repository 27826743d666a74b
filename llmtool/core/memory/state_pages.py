"""Where the states of a sequence lie, and which of them are kept as they were: checkpoints.

A state is written in place until it moves to another page, which leaves in the one before what it was. A checkpoint
gets its name when the step after it is planned, not before: unlike keys and values a state cannot be read in
the step that writes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from llmtool.core.memory.arena import Arena
from llmtool.core.memory.prefix_cache import PrefixCache
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.retention import ANSWER, PROMPT, WAY, level
from llmtool.core.memory.sequence_pages import SequencePages
from llmtool.core.memory.tables import Table, Tables, worth_a_checkpoint


class StatePages:
    """every, renew: tokens between checkpoints of a prompt, and after which a decoding sequence's newest replaces
    the one before."""

    def __init__(self, layout: Tables, arena: Arena, cache: PrefixCache, every: int, renew: int) -> None:
        self.tables = [t for t in layout.tables if t.is_state]
        self._block = layout.block
        self._arena = arena
        self._cache = cache
        self._every = every
        self._renew = max(1, renew // layout.block)

    # -- which are kept ------------------------------------------------------------------------------------

    def purpose(self, state: SequencePages, blocks: int) -> tuple[int, int]:
        """What the state after so many blocks is kept for: class and, on the way, level."""
        if blocks in state.dear:
            return PROMPT, 0
        if blocks >= (state.prompt - 1) // self._block:
            return ANSWER, 0
        return WAY, level(blocks * self._block, self._every)

    def _worth(self, state: SequencePages, blocks: int) -> bool:
        if blocks in state.keep:
            return True
        return worth_a_checkpoint(blocks * self._block, self._block, self._every)

    def turns(self, state: SequencePages, t: Table, index: int, optional: bool) -> bool:
        """Does the state move to another page at this entry, leaving what it was in the one before?"""
        if index == 0:
            return True
        table = state.tables[t.group]
        here = index == len(table) and state.length == index * t.tokens
        if here and self._arena.references(table[-1]) > 1:
            return True
        if not optional or not state.root or index % t.per_block:
            return False
        blocks = index // t.per_block
        if here:
            wanted = table[-1] in self._cache.index
        else:
            wanted = self._worth(state, blocks)
        return wanted and self._cache.worthwhile(*self.purpose(state, blocks))

    def leaves(self, state: SequencePages, t: Table, blocks: int, num_tokens: int) -> bool:
        """Does a page keep the state as it was after so many blocks?"""
        table, end = state.tables[t.group], blocks * t.per_block
        if end < len(table):
            return table[end] != table[end - 1]
        if num_tokens != blocks * self._block:
            return False
        return blocks % self._renew == 0 or self._worth(state, blocks)

    # -- moving and naming ---------------------------------------------------------------------------------

    def grow(
        self, state: SequencePages, t: Table, fresh: Collection[int], end: int, pages: Iterator[int]
    ) -> None:
        """Entries up to `end`; those not in `fresh` go on in the page before."""
        table = state.tables[t.group]
        for i in range(len(table), end):
            if i in fresh:
                table.append(next(pages))
                continue
            page = table[-1]
            if page in self._cache.index:  # no room to leave it: it is written again
                self._cache.forget_name(page)
            table.append(page)

    def note(self, state: SequencePages, block: int, num_tokens: int) -> None:
        """A step that reaches the block's end is submitted: its states will be named."""
        for t in self.tables:
            page = state.tables[t.group][(block + 1) * t.per_block - 1]
            if page != NONE and self.leaves(state, t, block + 1, num_tokens):
                state.names.append((block, t.columns[0], page))

    def name(self, state: SequencePages) -> None:
        """Name the states that submitted steps have left at block boundaries."""
        if not state.names:
            return
        for j, column, page in state.names:
            self._cache.name(state.hashes[j], column, page)
        blocks = sorted({j for j, _, _ in state.names})
        state.names.clear()
        state.superseded += [state.rolling, *blocks[:-1]]
        state.rolling = blocks[-1]

    def renew(self, state: SequencePages) -> None:
        """While decoding only the newest state is kept: the one before makes room for the next."""
        for last in state.superseded:
            if last < 0 or last >= len(state.hashes) or last == state.rolling or last + 1 in state.dear:
                continue
            spaced = worth_a_checkpoint((last + 1) * self._block, self._block, self._every)
            for page in self._at(state, last):
                if not spaced:
                    self._cache.forget(page)
                elif self._arena.key(page)[0] == ANSWER:
                    self._arena.touch(page, self._arena.key(page)[1], WAY)
        state.superseded.clear()

    def _at(self, state: SequencePages, block: int) -> list[int]:
        """Unused pages that keep the states after a block."""
        known = self._cache.index.get(state.hashes[block])
        pages = [] if known is None else [known.pages[t.columns[0]] for t in self.tables]
        return [p for p in pages if p != NONE and self._arena.is_evictable(p)]

    def last(self, state: SequencePages) -> list[tuple[int, int]]:
        """Unused pages that keep the newest checkpoint, where it is an answer's."""
        block = state.rolling
        if block < 0 or block >= len(state.hashes) or self.purpose(state, block + 1)[0] != ANSWER:
            return []
        return [(page, block) for page in self._at(state, block)]
