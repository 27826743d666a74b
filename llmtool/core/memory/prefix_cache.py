"""The prefix cache over the two-level arena: names of pages, the longest hit, and when and as what pages age.

Time is a clock that counts the bytes worth keeping. What was hit lives as long again as half the arena takes to
turn over, so that a scan does not displace it, and a point on the way as much longer per level. What came back
after it was evicted goes before others: where more is wanted in turn than there is room for, least recently used
would keep nothing, and so a part stays. One return in eight is let in, should the wants have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from llmtool.core.memory.arena import Arena
from llmtool.core.memory.geometry import UNIT
from llmtool.core.memory.hashing import chain
from llmtool.core.memory.layer_policy import joint_longest_hit
from llmtool.core.memory.prefix_index import NONE, PrefixIndex
from llmtool.core.memory.retention import ANSWER, LAST, ONCE, PROMPT, TRUNK, WAY, Wants, near_mark, page_level
from llmtool.core.memory.sequence_pages import SequencePages
from llmtool.core.memory.tables import Table, Tables

TAIL = 128  # tokens before a prompt's end at which the next one may part from it and lose little
MARKED = TAIL + 64  # tokens before a place where prompts part that its mark may lie
LET_IN = 8


class PrefixCache:
    """Names and ages of the arena's pages."""

    def __init__(self, layout: Tables, arena: Arena) -> None:
        pages = arena.num_large * arena.width
        self.index = PrefixIndex(layout.columns, pages)
        self.clock = 0
        self._arena = arena
        self._wants = Wants()
        arena.order = self._wants.order
        self._block = layout.block
        self._tables = layout.tables
        specs: dict[int, Table] = {t.kind: t for t in layout.tables}
        self._specs = [specs[kind].spec for kind in range(len(layout.columns))]
        # Types that read all that came before end a hit at the first block they lack.
        self._whole = sum(
            1 << k for k, spec in enumerate(self._specs) if spec.kind in ("full", "mla", "draft")
        )
        self._partial = [k for k in range(len(self._specs)) if not self._whole >> k & 1]
        self._reaches = [(1 << k, specs[k]) for k in self._partial]
        # Of each column, its table and which of a block's pages it names; of states nothing, they are named later.
        self._cells = [
            (t.group, t.per_block, NONE if t.is_state else i)
            for t in sorted(layout.tables, key=lambda t: t.columns.start)
            for i in range(len(t.columns))
        ]
        self._written = sum(1 << k for k, spec in enumerate(self._specs) if not specs[k].is_state)
        # Blocks that were evicted, oldest first, by the columns of a type that has all of them.
        self._evicted: dict[bytes, None] = {}
        kinds = sorted(range(len(self._specs)), key=lambda k: (not self._whole >> k & 1, specs[k].is_state))
        self._witness = layout.columns[kinds[0]]
        self._most_evicted = pages
        self._returns = 0
        states = [(t.kind, arena.types[t.kind].per_large) for t in layout.tables if t.is_state]
        self._state_pages = sum(-(-states.count(pair) // pair[1]) for pair in set(states))
        self._bonus = arena.num_large * arena.large_page // UNIT // 2

    # -- hits ----------------------------------------------------------------------------------------------

    def longest_hit(self, state: SequencePages) -> int:
        """Blocks of the longest prefix that every type can use, at least one token short of the whole. Fills
        `state.hashes` with the whole prompt's."""
        size = self._block
        most = (len(state.token_ids) - 1) // size
        chain(state.hashes, state.root, state.token_ids, size, most)
        get, full = self.index.get, self._whole
        found: list[int] = []
        for key in state.hashes[:most]:
            block = get(key)
            if block is None or block.whole & full != full:
                if full:
                    break
                found.append(0)
                continue
            found.append(block.whole)
        if not full:
            while found and not found[-1]:
                found.pop()
        upto = state.parted = len(found)
        if not upto or self._usable(found, upto):
            return upto
        masks = [sum(1 << i for i, whole in enumerate(found) if whole >> k & 1) for k in self._partial]
        return joint_longest_hit([self._specs[k] for k in self._partial], masks, upto, size)

    def _usable(self, found: Sequence[int], upto: int) -> bool:
        end = upto * self._block
        for bit, table in self._reaches:
            first = upto - 1 if table.is_state else table.first_live(end) // self._block
            for i in range(upto - 1, first - 1, -1):
                if not found[i] & bit:
                    return False
        return True

    def parts_at(self, state: SequencePages) -> int | None:
        """The kind of point at which a prompt parts from what is known of it; None where it does not: nothing is
        known, or what follows was evicted."""
        if not state.parted or self._came_back(state):
            return None
        first = max(0, state.parted - MARKED // self._block)
        known = map(self.index.get, state.hashes[first : state.parted])
        return near_mark([0 if block is None else block.mark for block in known])

    def parted_before(self, state: SequencePages) -> bool:
        """Has another prompt parted at the same place?"""
        block = self.index.get(state.hashes[state.parted - 1])
        return block is not None and block.mark == ONCE

    def _came_back(self, state: SequencePages) -> bool:
        more = state.parted < (len(state.token_ids) - 1) // self._block
        return more and state.hashes[state.parted] in self._evicted

    def note(self, state: SequencePages, kind: int | None, chat: bool) -> None:
        """A sequence begins: learn from where it parts from what is known, and whether what follows was evicted.
        chat: it is made of messages."""
        if kind is not None:
            self._wants.note(kind, state.parted * self._block)
            if kind == WAY:
                self.mark(state.hashes[state.parted - 1], PROMPT if self.parted_before(state) else ONCE)
        elif not state.parted:
            self._wants.expect(ANSWER if chat else PROMPT)
        self._arena.order = self._wants.order
        if self._came_back(state):
            self._returns += 1
            state.returned = self._returns % LET_IN != 0

    def mark(self, key: bytes, kind: int) -> None:
        """Sequences have a point of this kind after the block."""
        block = self.index.get(key)
        if block is not None and block.mark != PROMPT:
            block.mark = kind

    # -- names ---------------------------------------------------------------------------------------------

    def name_block(self, key: bytes, tables: Sequence[Sequence[int]], number: int) -> None:
        """Cache the pages of a sequence's block in all tables but those of states."""
        pages = [
            NONE if i < 0 else tables[group][number * per_block + i] for group, per_block, i in self._cells
        ]
        whole = self._written
        if NONE in pages:
            whole = 0
            for kind, columns in enumerate(self.index.types):
                if NONE not in pages[columns.start : columns.stop]:
                    whole |= 1 << kind
        if not self.index.add_fresh(key, pages, whole):
            for column, page in enumerate(pages):
                if page != NONE:
                    self.name(key, column, page)

    def name(self, key: bytes, column: int, page: int) -> None:
        """Cache a page under its key; of two with the same content, the one in use."""
        if page in self.index:
            return
        known = self.index.find(key, column)
        if known != NONE:
            if not self._arena.is_evictable(known):
                return
            self.forget(known)
        self.index.add(key, column, page)

    def forget(self, page: int) -> None:
        """An evictable page becomes empty."""
        self.index.drop(page)
        self._arena.forget(page)

    def forget_name(self, page: int) -> None:
        """A page is written anew: what others of its block and type held is of no use."""
        for other in self.index.drop(page):
            if self._arena.is_evictable(other):
                self.forget(other)

    # -- taking and giving back ----------------------------------------------------------------------------

    def take(self, seq: str, wants: Sequence[int]) -> list[Iterator[int]]:
        """Small pages per type, as many as wanted. Raises OutOfPages and changes nothing."""
        if not any(wants):
            return [iter(()) for _ in wants]
        taken = self._arena.take(wants, seq)
        if taken.evicted:
            self._forget_evicted(taken.evicted)
        return [iter(pages) for pages in taken.pages]

    def _forget_evicted(self, pages: Collection[int]) -> None:
        for page in pages:
            if page in self.index:
                key, column = self.index.name_of(page)
                if column in self._witness:
                    self._evicted[key] = None
                self.forget_name(page)
        while len(self._evicted) > self._most_evicted:
            del self._evicted[next(iter(self._evicted))]

    def release(
        self, page: int, state: SequencePages, depth: int, kind: int, high: int = 0, when: int | None = None
    ) -> None:
        """A sequence gives up a page that ends `depth` tokens into it. kind: what it is kept for, and on the way
        (WAY) its level. when: not now."""
        arena = self._arena
        if page not in self.index:
            arena.release(page, self.clock, depth, keep=False)
            return
        stamp = self.clock if when is None else when
        if depth <= state.hit * self._block:
            old = arena.key(page)[0]
            if kind == WAY:
                # It was hit as what it was kept for; a conversation's last end lies behind it now.
                kind = PROMPT if old == PROMPT else WAY
            stamp += self._bonus
        elif state.returned:
            stamp -= LAST
        if kind == WAY:
            stamp += high * self._bonus
        elif arena.references(page) == 1:
            self.clock += arena.types[arena.kind_of(page)].stride // UNIT
        arena.release(page, stamp, depth, True, kind)

    def way_level(self, t: Table, end: int) -> int:
        return page_level(t.spec, end)

    def worthwhile(self, kind: int, high: int = 0) -> bool:
        """Are states for another restart point worth more than what would go for them?"""
        key = self._arena.next_key(self._state_pages)
        if key is None:
            return True
        order = self._wants.order
        if kind != WAY:
            return order[kind] >= order[key[0]]
        return key[0] != TRUNK and (order[WAY], self.clock + high * self._bonus) > (order[key[0]], key[1])

    def freshen(self, state: SequencePages, left: Collection[tuple[int, int]], kind: int, when: int) -> None:
        """Pages of a sequence's restart points are as old as it is. left: (page, block of the sequence), if it is
        still that block's."""
        if state.returned:
            when -= LAST
        for page, block in left:
            named = page in self.index and self.index.name_of(page)[0] == state.hashes[block]
            if named and self._arena.is_evictable(page):
                self._arena.touch(page, max(when, self._arena.key(page)[1]), kind)

    def reset(self) -> None:
        for page in list(self.index.pages()):
            self._arena.forget(page)
        self.index.clear()
