"""The allocator for models whose layers cache different things: a sequence's block tables, one per group, over the
two-level arena (Jenga).

Every verb is all-or-nothing over all tables. What lies outside a window, and a state once it has moved to another
page, is given up when the sequence next grows, and not before: the step that read it last is then submitted. So
are states named for the prefix cache: unlike keys and values they cannot be read in the step that writes them.

Cached pages age by a clock that counts the bytes worth keeping. What was hit lives as long again as half the arena
takes to turn over, so that a scan does not displace it. Two kinds of pages go before all others. First what only a
prompt would need that parts from a sequence far from its end: pages outside windows, states on the way. Then what
came back after it was evicted: where more is wanted in turn than there is room for, least recently used would keep
nothing, and so a part stays. One return in eight is let in, should the wants have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from llmtool.core.memory import two_level_accounts as accounts
from llmtool.core.memory.allocator import Entries, Extension, Ledger, OutOfPages
from llmtool.core.memory.arena import Arena
from llmtool.core.memory.geometry import UNIT, KVCacheGroup
from llmtool.core.memory.hashing import page_hash, root_hash
from llmtool.core.memory.layer_policy import joint_longest_hit, live_blocks
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.prefix_index import NONE, PrefixIndex
from llmtool.core.memory.sequence_pages import Growth, SequencePages
from llmtool.core.memory.tables import (
    CHECKPOINT_EVERY,
    RENEW_EVERY,
    PlanPages,
    Table,
    Tables,
    longest,
    worth_a_checkpoint,
)
from llmtool.core.ports import PageCopy

TAIL = 128  # tokens before a prompt's end at which the next one may part from it and lose little
LAST = 1 << 40  # what pages that go before all others are older by
LET_IN = 8


class TwoLevelAllocator:
    """plan: not `uniform` or `static`. num_pages: large pages; host_pages: the same, of swap space. step_tokens:
    the most that one step computes of a sequence, which windows must have room for. checkpoint_every, renew_every:
    tokens between states kept of a prompt, and after which a decoding sequence's newest replaces the last."""

    def __init__(
        self,
        plan: PagePlan,
        num_pages: int,
        host_pages: int = 0,
        prefix_caching: bool = True,
        step_tokens: int = 2048,
        checkpoint_every: int = CHECKPOINT_EVERY,
        renew_every: int = RENEW_EVERY,
    ) -> None:
        self.plan = plan
        self.groups: tuple[KVCacheGroup, ...] = plan.groups
        self.num_pages = num_pages
        self.host_pages = host_pages
        self.prefix_caching = prefix_caching
        self.step_tokens = step_tokens
        self.arena = Arena.of(plan, num_pages)
        self._host = Arena.of(plan, host_pages) if host_pages else None
        self._sizes = PlanPages(plan, step_tokens)
        layout = Tables.of(plan)
        self.tables = layout.tables
        self.block = layout.block
        self._index = PrefixIndex(layout.columns)
        self._specs = [pool.type.spec for pool in plan.pools]
        # Types that read all that came before end a hit at the first block they lack.
        self._whole = sum(
            1 << k for k, spec in enumerate(self._specs) if spec.kind in ("full", "mla", "draft")
        )
        self._partial = [k for k in range(len(self._specs)) if not self._whole >> k & 1]
        self._every = checkpoint_every
        self._renew = max(1, renew_every // self.block)
        self._states = [t for t in self.tables if t.is_state]
        self._clock = 0
        self._evicted: dict[bytes, None] = {}  # blocks, oldest first, of the first table
        self._returns = 0
        self._bonus = num_pages * plan.large_page // UNIT // 2
        self._seqs: dict[str, SequencePages] = {}

    # -- questions -----------------------------------------------------------------------------------------

    @property
    def can_rewind(self) -> bool:
        """Whether computed tokens can be taken back: a state has moved on."""
        return not self._states

    def available(self) -> int:
        return self.arena.reclaimable

    def pages_for(self, num_tokens: int) -> int:
        return self._sizes.pages(num_tokens)

    def max_tokens(self) -> int:
        return longest(self._sizes, self.num_pages)

    def headroom(self, running: int) -> int:
        per_block = sum(t.per_block * self.arena.types[t.kind].stride for t in self.tables if not t.is_state)
        return -(-running * per_block // (2 * self.plan.large_page))

    def growth_fits(self, growths: Sequence[tuple[str, int]]) -> bool:
        need = 0
        for seq, target in growths:
            growth = self._growth(self._seqs[seq], target, optional=True)
            pairs = zip(growth.wants, self.arena.types, strict=True)
            need += sum(-(-want // kind.per_large) for want, kind in pairs)
        return need <= self.arena.reclaimable

    def would_free(self, seq: str) -> int:
        state, own = self._seqs[seq], dict[int, int]()
        for page in state.held():
            if self.arena.references(page) == 1:
                large = page // self.arena.width
                own[large] = own.get(large, 0) + 1
        return sum(self.arena.is_alone(large * self.arena.width, count) for large, count in own.items())

    def table(self, seq: str) -> tuple[tuple[int, ...], ...]:
        entry = self.arena.entry
        return tuple(
            tuple([0 if page == NONE else entry(page) for page in table]) for table in self._seqs[seq].tables
        )

    # -- growing -------------------------------------------------------------------------------------------

    def begin(
        self,
        seq: str,
        token_ids: Sequence[int],
        max_new: int,
        *,
        salt: str = "",
        headroom: int = 0,
        reuse: bool = True,
        hints: Sequence[int] = (),
    ) -> int:
        """hints: lengths of prefixes that later prompts may share, such as ends of chat messages."""
        assert seq not in self._seqs and max_new >= 1
        state, size = self._new(token_ids, salt, hints), self.block
        hit = self._longest_hit(state) if reuse and self.prefix_caching else 0
        returned = self._came_back(state, hit)
        self._take_over(state, hit)
        target = min(len(token_ids), state.length + max_new)
        try:
            self._check_whole(state, max_new, headroom)
            self._extend(seq, state, target)
        except OutOfPages:
            for page in state.held():
                self.arena.unhold(page)
            raise
        if returned:
            self._returns += 1
            state.returned = self._returns % LET_IN != 0
        self._seqs[seq] = state
        return hit * size

    def _new(self, token_ids: Sequence[int], salt: str, hints: Sequence[int] = ()) -> SequencePages:
        state = SequencePages(token_ids, root_hash(salt) if self.prefix_caching else b"", len(self.tables))
        size = self.block
        if self.prefix_caching:
            end = len(token_ids) - 1
            # A question of up to TAIL tokens may differ next time: the state before it is dearer than the one at
            # its end, which only the same prompt could use.
            before = (end - TAIL // 4) // TAIL * TAIL
            dear = (before if before >= size else end, *hints)
            state.dear = frozenset(n // size for n in dear if n >= size)
            state.keep = state.dear | {end // size}
        return state

    def _came_back(self, state: SequencePages, hit: int) -> bool:
        """Was the block after the hit cached once?"""
        if not self._evicted or (hit + 1) * self.block > len(state.token_ids):
            return False
        parent = state.hashes[hit - 1] if hit else state.root
        key = page_hash(parent, state.token_ids[hit * self.block : (hit + 1) * self.block])
        return key in self._evicted

    def _longest_hit(self, state: SequencePages) -> int:
        """Blocks of the longest prefix that every type can use, at least one token short of the whole."""
        size, parent, tokens, get = self.block, state.root, state.token_ids, self._index.get
        found: list[int] = []
        for start in range(0, len(tokens) - size, size):
            parent = page_hash(parent, tokens[start : start + size])
            block = get(parent)
            whole = 0 if block is None else block.whole
            if whole & self._whole != self._whole:
                break
            state.hashes.append(parent)
            found.append(whole)
        if not self._whole:
            while found and not found[-1]:
                found.pop()
        upto = len(found)
        if not upto or all(self._usable(kind, found, upto) for kind in self._partial):
            return upto
        masks = [sum(1 << i for i, whole in enumerate(found) if whole >> k & 1) for k in self._partial]
        return joint_longest_hit([self._specs[k] for k in self._partial], masks, upto, size)

    def _usable(self, kind: int, found: Sequence[int], upto: int) -> bool:
        bit = 1 << kind
        return all(found[i] & bit for i in live_blocks(self._specs[kind], upto, self.block))

    def _take_over(self, state: SequencePages, hit: int) -> None:
        del state.hashes[hit:]
        state.hit = state.registered = hit
        state.length = state.known = hit * self.block
        if not hit:
            return
        for t in self.tables:
            count = hit * t.per_block
            first = count - 1 if t.is_state else min(count, t.first_live(state.length) // t.tokens)
            table = [NONE] * first
            for i in range(first, count):
                column = t.columns[0 if t.is_state else i % t.per_block]
                page = self._index.find(state.hashes[i // t.per_block], column)
                assert page != NONE
                self.arena.hold(page)
                table.append(page)
            state.tables[t.group], state.first[t.group] = table, first

    def _check_whole(self, state: SequencePages, max_new: int, headroom: int) -> None:
        """The whole sequence and `headroom` large pages more must be there, or would soon be lacking."""
        wants = [0] * len(self._specs)
        for t in self.tables:
            held = len(state.tables[t.group]) - state.first[t.group]
            # A state that was hit is read and left behind.
            wants[t.kind] += max(0, t.peak(len(state.token_ids), max_new) - (0 if t.is_state else held))
        needed = self.arena.large_needed(wants) + headroom
        if needed > self.arena.reclaimable:
            self._refuse(wants, needed)

    def _refuse(self, wants: Sequence[int], needed: int) -> None:
        """Name the type that lacks most large pages."""
        lacks = [
            self.arena.large_needed([n if k == kind else 0 for k in range(len(wants))])
            for kind, n in enumerate(wants)
        ]
        name = self.arena.types[lacks.index(max(lacks))].name
        raise OutOfPages(needed, self.arena.reclaimable, name)

    def extend(self, seq: str, target: int) -> Extension | None:
        state = self._seqs[seq]
        if target <= state.room and not state.cow:
            if target > state.length:
                state.length = target
            return None
        self._settle(state)
        return self._extend(seq, state, target)

    def can_extend(self, seq: str, target: int) -> bool:
        state = self._seqs[seq]
        if target <= state.room and not state.cow:
            return True
        self._settle(state)
        return self.arena.fits(self._growth(state, target, optional=False).wants)

    def _settle(self, state: SequencePages) -> None:
        """The steps that wrote and read this sequence's pages are submitted: name its states, and give up what
        the next token does not read."""
        self._name_states(state)
        for page in state.stale:
            self._release(page, state, 0)
        state.stale.clear()
        whole = state.known // self.block * self.block  # pages of a block stay until it is hashed
        for t in self.tables:
            index = t.group
            live = min(t.first_live(state.known), whole)
            first = min(live // t.tokens, len(state.tables[index]))
            if first > state.first[index]:
                self._give_up(state, t, first)
        self._renew_states(state)

    def _give_up(self, state: SequencePages, t: Table, first: int) -> None:
        table = state.tables[t.group]
        for i in range(state.first[t.group], first):
            page, table[i] = table[i], NONE
            end = (i + 1) * t.tokens
            if not t.is_state:
                self._release(page, state, end, low=end < self._tail(state, t))
            elif table[i + 1] != page:
                self._release(
                    page, state, end, low=end < state.prompt and end // self.block not in state.dear
                )
        state.first[t.group] = first

    def _tail(self, state: SequencePages, t: Table) -> int:
        """Pages from here on make the prompt's last few hundred tokens usable: the next prompt may share what came
        before its question."""
        return t.first_live(state.prompt) - TAIL

    def _growth(self, state: SequencePages, target: int, optional: bool) -> Growth:
        """optional: with a page for every checkpoint worth having."""
        growth = Growth(len(self.tables), len(self._specs))
        for t in self.tables:
            table = state.tables[t.group]
            have, end = len(table), -(-target // t.tokens)
            index, filled = divmod(state.length, t.tokens)
            fresh: Collection[int] = range(have, end)
            if t.is_state:
                fresh = [i for i in range(have, end) if self._turns(state, t, i, optional)]
                # The last page is written in place, whether its tokens are full or not.
                shared = have > 0 and filled > 0 and self.arena.references(table[-1]) > 1
            else:
                shared = filled > 0 and index < have and self._read_only(table[index])
            growth.fresh[t.group] = fresh
            growth.wants[t.kind] += len(fresh)
            if state.cow and shared and target > state.length:
                growth.copied.append((t.group, index))
                growth.wants[t.kind] += 1
        return growth

    def _read_only(self, page: int) -> bool:
        return self.arena.references(page) > 1 or page in self._index

    def _turns(self, state: SequencePages, t: Table, index: int, optional: bool) -> bool:
        """Does the state move to another page at this entry, leaving what it was in the one before?"""
        if index == 0:
            return True
        table = state.tables[t.group]
        if index == len(table) and state.length == index * t.tokens and self._others_read(table[-1]):
            return True
        if not optional or not self.prefix_caching or index % t.per_block:
            return False
        if index == len(table) and state.length == index * t.tokens:
            return table[-1] in self._index
        return self._worth(state, index // t.per_block)

    def _others_read(self, page: int) -> bool:
        return self.arena.references(page) > 1

    def _worth(self, state: SequencePages, blocks: int) -> bool:
        return blocks in state.keep or worth_a_checkpoint(blocks * self.block, self.block, self._every)

    def _extend(self, seq: str, state: SequencePages, target: int) -> Extension | None:
        growth = self._growth(state, target, optional=True)
        if not self.arena.fits(growth.wants):
            growth = self._growth(state, target, optional=False)
            if not self.arena.fits(growth.wants):
                self._refuse(growth.wants, self.arena.large_needed(growth.wants))
        pages = self._take(seq, growth.wants)
        entry = self.arena.entry
        edits: list[tuple[int, int, int]] = []
        copies: list[PageCopy] = []
        for group, index in growth.copied:
            table = state.tables[group]
            old, own = table[index], next(pages[self.tables[group].kind])
            for i in range(index, len(table)):
                if table[i] == old:
                    table[i] = own
                    edits.append((group, i, entry(own)))
            copies.append(PageCopy(entry(old), entry(own), group))
            state.stale.append(old)  # read by this step's copies
        new_pages = []
        for t in self.tables:
            table, fresh = state.tables[t.group], growth.fresh[t.group]
            start, end = len(table), -(-target // t.tokens)
            if not t.is_state:
                table.extend([next(pages[t.kind]) for _ in fresh])
            else:
                self._turn_state(state, t, fresh, end, pages[t.kind])
            new_pages.append(tuple([entry(page) for page in table[start:]]))
        if target > state.length:
            state.length = target
            state.cow = False
        state.room = 0 if state.stale else min(len(state.tables[t.group]) * t.tokens for t in self.tables)
        if not edits and not any(new_pages):
            return None
        return Extension(tuple(new_pages), tuple(edits), tuple(copies))

    def _turn_state(
        self, state: SequencePages, t: Table, fresh: Collection[int], end: int, pages: Iterator[int]
    ) -> None:
        """Entries up to `end`; those not in `fresh` go on in the page before."""
        table = state.tables[t.group]
        for i in range(len(table), end):
            if i in fresh:
                table.append(next(pages))
                continue
            page = table[-1]
            if page in self._index:  # no room to leave it: it is written again
                self._forget_name(page)
            table.append(page)

    def _forget_name(self, page: int) -> None:
        for other in self._index.drop(page):
            if self.arena.is_evictable(other):
                self._index.drop(other)
                self.arena.forget(other)

    def _take(self, seq: str, wants: Sequence[int]) -> list[Iterator[int]]:
        if not any(wants):
            return [iter(()) for _ in wants]
        taken = self.arena.take(wants, seq)
        for page in taken.evicted:
            if page in self._index:
                key, column = self._index.name_of(page)
                if column == 0:
                    self._evicted[key] = None
                self._forget_name(page)
        while len(self._evicted) > self.num_pages * self.arena.width:
            del self._evicted[next(iter(self._evicted))]
        return [iter(pages) for pages in taken.pages]

    def _release(self, page: int, state: SequencePages, depth: int, low: bool = False) -> None:
        stamp, keep = self._clock, page in self._index
        low = low and depth > state.hit * self.block
        if low:
            stamp -= 2 * LAST
        elif depth <= state.hit * self.block:
            stamp += self._bonus
        elif state.returned:
            stamp -= LAST
        if keep and not low and self.arena.references(page) == 1:
            self._clock += self.arena.types[self.arena.kind_of(page)].stride // UNIT
        self.arena.release(page, stamp, depth, keep)

    # -- the prefix cache ----------------------------------------------------------------------------------

    def advance(self, seq: str, num_tokens: int) -> None:
        state = self._seqs[seq]
        if num_tokens <= state.known:
            return
        state.known = num_tokens
        if num_tokens // self.block > state.registered:
            state.room = 0
            if self.prefix_caching:
                self._register(state, num_tokens)

    def _register(self, state: SequencePages, num_tokens: int) -> None:
        size, last = self.block, num_tokens // self.block
        for j in range(state.registered, last):
            parent = state.hashes[-1] if state.hashes else state.root
            key = page_hash(parent, state.token_ids[j * size : (j + 1) * size])
            state.hashes.append(key)
            for t in self.tables:
                table = state.tables[t.group]
                if t.is_state:
                    page = table[(j + 1) * t.per_block - 1]
                    if page != NONE and self._leaves(state, t, j + 1, num_tokens):
                        state.names.append((j, t.columns[0], page))
                    continue
                for i, column in enumerate(t.columns):
                    page = table[j * t.per_block + i]
                    if page != NONE:
                        self._name(key, column, page)
        state.registered = last

    def _leaves(self, state: SequencePages, t: Table, blocks: int, num_tokens: int) -> bool:
        """Does a page keep the state as it was after so many blocks?"""
        table, end = state.tables[t.group], blocks * t.per_block
        if end < len(table):
            return table[end] != table[end - 1]
        if num_tokens != blocks * self.block:
            return False
        return blocks % self._renew == 0 or self._worth(state, blocks)

    def _name(self, key: bytes, column: int, page: int) -> None:
        """Cache a page under its key; of two with the same content, the one in use."""
        if page in self._index:
            return
        known = self._index.find(key, column)
        if known != NONE:
            if not self.arena.is_evictable(known):
                return
            self._index.drop(known)
            self.arena.forget(known)
        self._index.add(key, column, page)

    def _name_states(self, state: SequencePages) -> None:
        """Name the states that submitted steps have left at block boundaries."""
        if not state.names:
            return
        newest = max(j for j, _, _ in state.names)
        for j, column, page in state.names:
            self._name(state.hashes[j], column, page)
        state.names.clear()
        state.superseded, state.rolling = state.rolling, newest

    def _renew_states(self, state: SequencePages) -> None:
        """While decoding only the newest state is kept: the one before makes room for the next."""
        last, state.superseded = state.superseded, -1
        if last >= 0 and last != state.rolling and not self._worth(state, last + 1):
            block = self._index.get(state.hashes[last])
            columns = [t.columns[0] for t in self._states]
            pages = [] if block is None else [block.pages[c] for c in columns]
            for page in pages:
                if page != NONE and page in self._index and self.arena.is_evictable(page):
                    self._index.drop(page)
                    self.arena.forget(page)

    # -- forks and rewinding -------------------------------------------------------------------------------

    def can_fork(self, parent: str, num_tokens: int) -> bool:
        source = self._seqs[parent]
        if source.host is not None or num_tokens > source.length:
            return False
        for t in self.tables:
            if t.is_state:
                if num_tokens != source.known:
                    return False
            elif t.first_live(num_tokens) // t.tokens < source.first[t.group]:
                return False
        return True

    def fork(self, parent: str, child: str, token_ids: Sequence[int], num_tokens: int) -> None:
        assert child not in self._seqs and self.can_fork(parent, num_tokens)
        source = self._seqs[parent]
        state = SequencePages(token_ids, source.root, len(self.tables))
        for t in self.tables:
            table = source.tables[t.group][: -(-num_tokens // t.tokens)]
            first = min(t.first_live(num_tokens) // t.tokens, len(table))
            state.tables[t.group] = [NONE] * first + table[first:]
            state.first[t.group] = first
        for page in state.held():
            self.arena.hold(page)
        full = num_tokens // self.block
        state.hashes = source.hashes[:full]
        state.registered = min(full, source.registered)
        state.hit, state.keep, state.dear = min(full, source.hit), source.keep, source.dear
        state.length = state.known = num_tokens
        state.cow = source.cow = True
        state.room = source.room = 0
        self._seqs[child] = state

    def truncate(self, seq: str, num_tokens: int) -> tuple[int, ...]:
        state = self._seqs[seq]
        assert state.host is None
        if num_tokens < state.length:
            assert num_tokens >= state.known or self.can_rewind, "a state cannot be taken back"
            for t in self.tables:
                table, keep = state.tables[t.group], -(-num_tokens // t.tokens)
                assert t.is_state or state.first[t.group] <= t.first_live(num_tokens) // t.tokens
                while len(table) > max(keep, state.first[t.group]):
                    page = table.pop()
                    if not table or table[-1] != page:
                        self._release(page, state, (len(table) + 1) * t.tokens)
            full = num_tokens // self.block
            del state.hashes[full:]
            state.registered = min(state.registered, full)
            state.length = num_tokens
            state.known = min(state.known, num_tokens)
            state.cow, state.room = True, 0
        return tuple(len(table) for table in state.tables)

    def preempt(self, seq: str) -> None:
        self._drop(self._seqs.pop(seq))

    def end(self, seq: str) -> None:
        state = self._seqs.pop(seq, None)
        if state is not None:
            self._drop(state)

    def _drop(self, state: SequencePages) -> None:
        if state.host is not None:
            self._drop_host(state)
            return
        self._clock += 1
        self._name_states(state)
        for t in self.tables:
            table, first = state.tables[t.group], state.first[t.group]
            for i in range(len(table) - 1, first - 1, -1):
                if i == first or table[i - 1] != table[i]:
                    self._release(table[i], state, (i + 1) * t.tokens)
            state.tables[t.group], state.first[t.group] = [], 0
        for page in state.stale:
            self._release(page, state, 0)
        state.stale.clear()

    def reset_cache(self) -> bool:
        if any(state.host is None for state in self._seqs.values()):
            return False
        for page in list(self._index.pages()):
            self.arena.forget(page)
        self._index.clear()
        return True

    # -- swapping ------------------------------------------------------------------------------------------

    def swap_out(self, seq: str) -> list[PageCopy] | None:
        state = self._seqs[seq]
        assert state.host is None
        self._settle(state)
        wants = [0] * len(self._specs)
        for t in self.tables:
            wants[t.kind] += len(self._distinct(state, t))
        if self._host is None or not self._host.fits(wants):
            return None
        taken = [iter(pages) for pages in self._host.take(wants, seq).pages]
        copies: list[PageCopy] = []
        host: list[list[int]] = []
        shapes = [(len(table), first) for table, first in zip(state.tables, state.first, strict=True)]
        for t in self.tables:
            pages = self._distinct(state, t)
            slots = [next(taken[t.kind]) for _ in pages]
            pairs = zip(pages, slots, strict=True)
            copies += [PageCopy(self.arena.entry(p), self._host.entry(slot), t.group) for p, slot in pairs]
            host.append(slots)
        self._drop(state)
        state.host, state.room, state.cow = host, 0, False
        for t, (length, first) in zip(self.tables, shapes, strict=True):
            state.tables[t.group], state.first[t.group] = [NONE] * length, first
        return copies

    @staticmethod
    def _distinct(state: SequencePages, t: Table) -> list[int]:
        table = state.tables[t.group]
        return table[-1:] if t.is_state else table[state.first[t.group] :]

    def swap_in(self, seq: str, target: int = 0) -> list[PageCopy]:
        state = self._seqs[seq]
        assert state.host is not None and self._host is not None
        ends = [max(len(state.tables[t.group]), -(-target // t.tokens)) for t in self.tables]
        wants = [0] * len(self._specs)
        for t in self.tables:
            wants[t.kind] += 1 if t.is_state else ends[t.group] - state.first[t.group]
        if not self.arena.fits(wants):
            self._refuse(wants, self.arena.large_needed(wants))
        pages = self._take(seq, wants)
        copies: list[PageCopy] = []
        for t, slots in zip(self.tables, state.host, strict=True):
            first, end = state.first[t.group], ends[t.group]
            own = [next(pages[t.kind]) for _ in range(1 if t.is_state else end - first)]
            state.tables[t.group] = [NONE] * first + own * (end - first if t.is_state else 1)
            copies += [
                PageCopy(self._host.entry(slot), self.arena.entry(page), t.group)
                for slot, page in zip(slots, own, strict=False)  # those that follow are empty yet
            ]
        self._drop_host(state)
        state.length = max(state.length, target)
        return copies

    def _drop_host(self, state: SequencePages) -> None:
        assert state.host is not None and self._host is not None
        for slots in state.host:
            for slot in slots:
                self._host.release(slot, 0, keep=False)
        state.host = None

    # -- handing over --------------------------------------------------------------------------------------

    @staticmethod
    def _span(t: Table, num_tokens: int) -> tuple[int, int]:
        """The entries of a table that the token at position `num_tokens` reads, of those before it."""
        end = -(-num_tokens // t.tokens)
        return min(t.first_live(num_tokens) // t.tokens, end - 1 if t.is_state else end), end

    def lent(self, seq: str, num_tokens: int) -> Entries:
        state, entry = self._seqs[seq], self.arena.entry
        found = []
        for t in self.tables:
            first, end = self._span(t, num_tokens)
            assert state.host is None and first >= state.first[t.group]
            pages = state.tables[t.group][end - 1 if t.is_state else first : end]
            found.append(tuple([entry(page) for page in pages]))
        return tuple(found)

    def receive(
        self, seq: str, token_ids: Sequence[int], num_tokens: int, *, salt: str = "", headroom: int = 0
    ) -> Entries:
        assert seq not in self._seqs and 0 < num_tokens <= len(token_ids)
        wants = [0] * len(self._specs)
        for t in self.tables:
            first, end = self._span(t, num_tokens)
            wants[t.kind] += 1 if t.is_state else end - first
        needed = self.arena.large_needed(wants) + headroom
        if needed > self.arena.reclaimable or not self.arena.fits(wants):
            self._refuse(wants, needed)
        pages = self._take(seq, wants)
        state = self._new(token_ids, salt)
        for t in self.tables:
            first, end = self._span(t, num_tokens)
            own = [next(pages[t.kind]) for _ in range(1 if t.is_state else end - first)]
            state.tables[t.group] = [NONE] * first + own * (end - first if t.is_state else 1)
            state.first[t.group] = first
        state.length = num_tokens
        self._seqs[seq] = state
        return self.lent(seq, num_tokens)

    # -- accounts ------------------------------------------------------------------------------------------

    def usage(self) -> tuple[int, int]:
        return (
            self.num_pages - self.arena.reclaimable,
            self.arena.reclaimable - self.arena.num_free,
        )

    def ledger(self) -> Ledger:
        return accounts.ledger(self)

    def bill(self, seq: str) -> dict[str, int]:
        return accounts.bill(self, seq)

    def check(self) -> None:
        accounts.check(self)
