"""The allocator for models whose layers cache different things: a sequence's block tables, one per group, over the
two-level arena (Jenga).

Every verb is all-or-nothing over all tables. What lies outside a window, and a state once it has moved to another
page, is given up when the sequence next grows, and not before: the step that read it last is then submitted. So
are states named for the prefix cache: unlike keys and values they cannot be read in the step that writes them.

What is cached and how it ages is `PrefixCache`'s, which states are kept `StatePages`'s. A draft model beside its
target is one more layer type of the geometry (`ModelGeometry.with_draft`): its tables grow with its target's and
are rolled back by the same `truncate`, so a page of the draft is there wherever one of the target is. The draft may
lag: it writes through its own tables what of [its own progress, target's length) it has not computed, and a hit is
one that is valid for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from llmtool.core.memory import two_level_accounts as accounts
from llmtool.core.memory import two_level_forks as forks
from llmtool.core.memory import two_level_handover as handover
from llmtool.core.memory import two_level_release as release
from llmtool.core.memory import two_level_swap as swap
from llmtool.core.memory.allocator import Entries, Extension, Ledger, OutOfPages
from llmtool.core.memory.arena import Arena
from llmtool.core.memory.geometry import UNIT, KVCacheGroup
from llmtool.core.memory.growing import Grower
from llmtool.core.memory.hashing import chain, root_hash
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.prefix_cache import TAIL, PrefixCache
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.retention import PROMPT, WAY
from llmtool.core.memory.sequence_pages import SequencePages
from llmtool.core.memory.state_pages import StatePages
from llmtool.core.memory.tables import CHECKPOINT_EVERY, RENEW_EVERY, PlanPages, Tables, longest
from llmtool.core.ports import PageCopy


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
        self.cache = PrefixCache(layout, self.arena)
        self._states = StatePages(layout, self.arena, self.cache, checkpoint_every, renew_every)
        self._grower = Grower(self.tables, self.arena, self.cache.index, self._states)
        # Tables of which what lies behind is given up.
        reaching = [t for t in self.tables if t.spec.kind in release.REACHING]
        self._reaching = [
            [t for t in reaching if t.kind == kind] for kind in sorted({t.kind for t in reaching})
        ]
        # Table, kind, is it a state's, and units of a large page and of a small one: for entries in one go.
        units, types = plan.large_page // UNIT, self.arena.types
        self._rows = [(t, t.kind, t.is_state, units, types[t.kind].stride // UNIT) for t in self.tables]
        self._page_sizes = sorted({t.tokens for t in self.tables})
        self._waiting: tuple[str, Sequence[int], bytes, list[bytes]] | None = None
        self._seqs: dict[str, SequencePages] = {}

    # -- questions -----------------------------------------------------------------------------------------

    @property
    def can_rewind(self) -> bool:
        """Whether computed tokens can be taken back: a state has moved on."""
        return not self._states.tables

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
            growth = self._grower.plan(self._seqs[seq], target, optional=True)
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

    # -- beginning -----------------------------------------------------------------------------------------

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
        state = self._new(token_ids, salt, hints)
        hit = 0
        kind: int | None = None
        if self.prefix_caching:
            if self._waiting is not None and self._waiting[:3] == (seq, token_ids, state.root):
                state.hashes = self._waiting[3]  # one that waits at the queue's head asks in every step
            if reuse:
                hit = self.cache.longest_hit(state)
                kind = self.cache.parts_at(state)
                if kind == WAY and state.parted > hit and self.cache.parted_before(state):
                    state.dear |= {state.parted}
                    state.keep |= {state.parted}
        self._take_over(state, hit)
        adopted: list[tuple[int, str]] = []
        try:
            self._check_whole(state, max_new, headroom)
            adopted = self._go_on_from(seq, state)
            self._extend(seq, state, min(len(token_ids), state.length + max_new))
        except OutOfPages:
            for page, request in adopted:
                self.arena.adopt(page, request)
            for page in state.held():
                self.arena.unhold(page)
            self._waiting = (seq, token_ids, state.root, state.hashes)
            raise
        self._waiting = None
        if reuse and self.prefix_caching:
            self.cache.note(state, kind, bool(hints))
        self._seqs[seq] = state
        return hit * self.block

    def _new(self, token_ids: Sequence[int], salt: str, hints: Sequence[int]) -> SequencePages:
        """A sequence, and where its prompt is likely to be parted from."""
        state = SequencePages(token_ids, root_hash(salt) if self.prefix_caching else b"", len(self.tables))
        if not self.prefix_caching:
            return state
        size, end = self.block, len(state.token_ids) - 1
        # A question of up to TAIL tokens may differ next time: the state before it is dearer than the one at its
        # end, which only the same prompt could use.
        before = (end - TAIL // 4) // TAIL * TAIL
        dear = (before if before >= size else end, *hints)
        state.dear = frozenset(n // size for n in dear if size <= n <= end + 1)
        state.keep = state.dear | {end // size}
        return state

    def _take_over(self, state: SequencePages, hit: int) -> None:
        state.hit = state.registered = hit
        state.length = state.known = hit * self.block
        if not hit:
            return
        get = self.cache.index.get
        # Without a type that keeps everything, what lies before all windows may be gone.
        found = [get(key) for key in state.hashes[:hit]]
        blocks: list[list[int]] = [[] if block is None else block.pages for block in found]
        for t in self.tables:
            count, column, per_block = hit * t.per_block, t.columns.start, t.per_block
            first = count - 1 if t.is_state else min(count, t.first_live(state.length) // t.tokens)
            if t.is_state:
                held = [blocks[-1][column]]
            elif per_block == 1:
                held = [pages[column] for pages in blocks[first - count :]] if first < count else []
            else:
                held = [blocks[i // per_block][column + i % per_block] for i in range(first, count)]
            self.arena.hold_all(held)
            state.tables[t.group], state.first[t.group] = [NONE] * first + held, first

    def _go_on_from(self, seq: str, state: SequencePages) -> list[tuple[int, str]]:
        """What is empty beside the deepest pages of the known prefix is this sequence's."""
        known = self.cache.index.get(state.hashes[state.parted - 1]) if state.parted else None
        pages = [] if known is None else [page for page in known.pages if page != NONE]
        return [(page, self.arena.adopt(page, seq)) for page in pages]

    def _check_whole(self, state: SequencePages, max_new: int, headroom: int) -> None:
        """The whole sequence and `headroom` large pages more must be there, or would soon be lacking."""
        wants = [0] * len(self.arena.types)
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

    # -- growing -------------------------------------------------------------------------------------------

    def extend(self, seq: str, target: int, *, drafts: bool = False) -> Extension | None:
        state = self._seqs[seq]
        if target <= state.room:
            if target > state.length:
                state.length = target
            return None
        if not drafts:  # what the step's own tokens read stays
            release.settle(self, state)
        return self._extend(seq, state, target)

    def can_extend(self, seq: str, target: int, *, drafts: bool = False) -> bool:
        state = self._seqs[seq]
        if target <= state.room:
            return True
        if not drafts:
            release.settle(self, state)
        return self.arena.fits(self._grower.plan(state, target, optional=False).wants)

    def _extend(self, seq: str, state: SequencePages, target: int) -> Extension | None:
        growth = self._grower.plan(state, target, optional=True)
        if any(growth.wants) and not self.arena.fits(growth.wants):
            growth = self._grower.plan(state, target, optional=False)
            if not self.arena.fits(growth.wants):
                self._refuse(growth.wants, self.arena.large_needed(growth.wants))
        pages = self.cache.take(seq, growth.wants)
        edits: list[tuple[int, int, int]] = []
        copies: list[PageCopy] = []
        for group, index in growth.copied:
            own = next(pages[self.tables[group].kind])
            self._copy(state, group, index, own, edits, copies)
        width, changed, tables, counts = self.arena.width, False, state.tables, growth.counts
        new_pages: list[tuple[int, ...]] = []
        for t, kind, is_state, large_units, small_units in self._rows:
            table = tables[t.group]
            start = len(table)
            if is_state:
                if t.group in growth.fresh:
                    self._states.grow(state, t, growth.fresh[t.group], -(-target // t.tokens), pages[kind])
            elif counts[kind] == 1:
                page = next(pages[kind])
                table.append(page)
                new_pages.append((page // width * large_units + page % width * small_units,))
                changed = True
                continue
            else:
                table += islice(pages[kind], counts[kind])
            fresh = table[start:]
            changed = changed or bool(fresh)
            new_pages.append(tuple([p // width * large_units + p % width * small_units for p in fresh]))
        if target > state.length:
            state.length = target
        if target > state.known:
            state.cow = False
        # Every table has pages up to the next boundary of its own.
        state.room = 0 if state.stale or state.cow else min([-(-target // n) * n for n in self._page_sizes])
        if not edits and not changed:
            return None
        return Extension(tuple(new_pages), tuple(edits), tuple(copies))

    def _copy(
        self,
        state: SequencePages,
        group: int,
        index: int,
        own: int,
        edits: list[tuple[int, int, int]],
        copies: list[PageCopy],
    ) -> None:
        table, entry = state.tables[group], self.arena.entry
        old = table[index]
        for i in range(index, len(table)):
            if table[i] == old:
                table[i] = own
                edits.append((group, i, entry(own)))
        if index > state.first[group] and table[index - 1] == old:
            return  # a state is read in the entry before the one that is written
        copies.append(PageCopy(entry(old), entry(own), group))
        state.stale.append(old)  # read by this step's copies

    def advance(self, seq: str, num_tokens: int) -> None:
        state = self._seqs[seq]
        if num_tokens <= state.known:
            return
        state.known = num_tokens
        last = num_tokens // self.block
        if last > state.registered:
            state.room = 0
            if self.prefix_caching:
                self._register(state, num_tokens, last)

    def _register(self, state: SequencePages, num_tokens: int, last: int) -> None:
        hashes, size = state.hashes, self.block
        if len(hashes) < last:
            chain(hashes, state.root, state.token_ids, size, last)
        for j in range(state.registered, last):
            self.cache.name_block(hashes[j], state.tables, j)
            if self._states.tables:
                self._states.note(state, j, num_tokens)
            if j + 1 in state.dear:
                self.cache.mark(hashes[j], PROMPT)
        state.registered = last

    # -- forks and rewinding -------------------------------------------------------------------------------

    def can_fork(self, parent: str, num_tokens: int) -> bool:
        return forks.can_fork(self, parent, num_tokens)

    def fork(self, parent: str, child: str, token_ids: Sequence[int], num_tokens: int) -> None:
        forks.fork(self, parent, child, token_ids, num_tokens)

    def truncate(self, seq: str, num_tokens: int) -> tuple[int, ...]:
        return forks.truncate(self, seq, num_tokens)

    # -- ending --------------------------------------------------------------------------------------------

    def preempt(self, seq: str) -> None:
        release.drop(self, self._seqs.pop(seq), over=False)

    def end(self, seq: str) -> None:
        state = self._seqs.pop(seq, None)
        if state is not None:
            release.drop(self, state, over=True)

    def reset_cache(self) -> bool:
        if any(state.host is None for state in self._seqs.values()):
            return False
        self.cache.reset()
        return True

    # -- swapping ------------------------------------------------------------------------------------------

    def swap_out(self, seq: str) -> list[PageCopy] | None:
        return swap.swap_out(self, seq)

    def swap_in(self, seq: str, target: int = 0) -> list[PageCopy]:
        return swap.swap_in(self, seq, target)

    def lent(self, seq: str, num_tokens: int) -> Entries:
        return handover.lent(self, seq, num_tokens)

    def receive(
        self, seq: str, token_ids: Sequence[int], num_tokens: int, *, salt: str = "", headroom: int = 0
    ) -> Entries:
        return handover.receive(self, seq, token_ids, num_tokens, salt, headroom)

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
