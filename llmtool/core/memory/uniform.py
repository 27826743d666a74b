"""PagedAttention's allocator: one kind of page, reference counts, copy-on-write, a prefix cache with LRU eviction
(PagedAttention, sections 4.2 to 4.5), and swap space in host memory.

A page is free (no content worth keeping), cached (unreferenced, its hash still known: evicted when pages run
short) or used (its reference count says by how many tables). The cache is prefix-closed: a cached page's
ancestors are cached or used, because sequences release their deepest pages first and hold on to the canonical
copy of any page they had to compute again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from llmtool.core.memory.allocator import Entries, Extension, Ledger, OutOfPages
from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.memory.hashing import page_hash, root_hash
from llmtool.core.ports import PageCopy


class _Sequence:
    """Table and hash chain of one sequence. `host` is set while its KV lies in host memory."""

    __slots__ = ("cow", "hashes", "host", "length", "pages", "root", "shadow", "token_ids")

    def __init__(self, token_ids: Sequence[int], root: bytes) -> None:
        self.token_ids = token_ids
        self.root = root
        self.pages: list[int] = []
        self.hashes: list[bytes] = []  # of the leading full pages registered so far
        self.shadow: dict[int, int] = {}  # page index -> canonical page with the same hash, held but not read
        self.length = 0  # positions that may be written
        self.cow = False  # the partly filled last page may be shared: look before writing
        self.host: list[int] | None = None


class UniformAllocator:
    """num_pages: device pages of `group`; host_pages: swap space, in pages."""

    def __init__(
        self, group: KVCacheGroup, num_pages: int, host_pages: int = 0, prefix_caching: bool = True
    ) -> None:
        assert num_pages >= 1 and host_pages >= 0
        self.groups: tuple[KVCacheGroup, ...] = (group,)
        self.num_pages = num_pages
        self.host_pages = host_pages
        self.prefix_caching = prefix_caching
        self._tokens_per_page = group.tokens_per_page
        self._units = group.page_units
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low pages first
        self._refs = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = (
            OrderedDict()
        )  # unreferenced, hashed; least recently used first
        self._host_free = list(range(host_pages - 1, -1, -1))
        self._seqs: dict[str, _Sequence] = {}

    # -- questions -----------------------------------------------------------------------------------------

    def available(self) -> int:
        return len(self._free) + len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._tokens_per_page)

    def max_tokens(self) -> int:
        return self.num_pages * self._tokens_per_page

    def headroom(self, running: int) -> int:
        return running // 2

    def growth_fits(self, growths: Sequence[tuple[str, int]]) -> bool:
        pages_for, seqs = self.pages_for, self._seqs
        return sum(pages_for(n) - len(seqs[seq].pages) for seq, n in growths) <= self.available()

    def would_free(self, seq: str) -> int:
        return sum(self._refs[page] == 1 for page in self._seqs[seq].pages)

    def table(self, seq: str) -> tuple[tuple[int, ...], ...]:
        units = self._units
        return (tuple([page * units for page in self._seqs[seq].pages]),)

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
        assert seq not in self._seqs and max_new >= 1
        state = _Sequence(token_ids, root_hash(salt) if self.prefix_caching else b"")
        hits = self._match(state) if reuse else []
        cached = len(hits) * self._tokens_per_page
        target = min(len(token_ids), cached + max_new)
        new = self.pages_for(target) - len(hits)
        # A hit on a cached page is not there to be handed out a second time.
        have = self.available() - sum(1 for page in hits if self._refs[page] == 0)
        wanted = max(new, self.pages_for(len(token_ids)) - len(hits) + headroom)
        if wanted > have:
            raise OutOfPages(wanted, have, self.groups[0].name)
        for page in hits:
            self._reference(page)
        state.pages = hits + [self._take() for _ in range(new)]
        state.length = target
        self._seqs[seq] = state
        return cached

    def _match(self, state: _Sequence) -> list[int]:
        """Pages of the longest cached prefix, at least one token short of the whole; fills state.hashes."""
        hits: list[int] = []
        if not self.prefix_caching:
            return hits
        size, parent = self._tokens_per_page, state.root
        for start in range(0, len(state.token_ids) - size, size):
            parent = page_hash(parent, state.token_ids[start : start + size])
            page = self._page_of.get(parent)
            if page is None:
                break
            hits.append(page)
            state.hashes.append(parent)
        return hits

    def extend(self, seq: str, target: int, *, drafts: bool = False) -> Extension | None:
        state = self._seqs[seq]
        new = -(-target // self._tokens_per_page) - len(state.pages)
        if new <= 0 and not state.cow:
            if target > state.length:
                state.length = target
            return None
        return self._extend(state, target)

    def can_extend(self, seq: str, target: int, *, drafts: bool = False) -> bool:
        state = self._seqs[seq]
        return self._demand(state, target)[0] <= self.available() + len(self._spare(state))

    def _demand(self, state: _Sequence, target: int) -> tuple[int, int | None]:
        """Pages that growing to `target` takes, and the index of the page to copy before it is written."""
        new = max(0, -(-target // self._tokens_per_page) - len(state.pages))
        index, filled = divmod(state.length, self._tokens_per_page)
        if state.cow and filled and target > state.length and self._read_only(state.pages[index]):
            return new + 1, index
        return new, None

    def _extend(self, state: _Sequence, target: int) -> Extension | None:
        needed, shared = self._demand(state, target)
        if needed > self.available():
            if needed > self.available() + len(self._spare(state)):
                raise OutOfPages(needed, self.available(), self.groups[0].name)
            self._drop_shadows(state)
        units = self._units
        edits: tuple[tuple[int, int, int], ...] = ()
        copies: tuple[PageCopy, ...] = ()
        if shared is not None:
            old, own = state.pages[shared], self._take()
            self._release(old)
            state.pages[shared] = own
            edits = ((0, shared, own * units),)
            copies = (PageCopy(old * units, own * units),)
            needed -= 1
        if target > state.length:
            state.cow = False
            state.length = target
        if not needed and not edits:
            return None
        taken = [self._take() for _ in range(needed)]
        state.pages.extend(taken)
        return Extension((tuple([page * units for page in taken]),), edits, copies)

    def _read_only(self, page: int) -> bool:
        """Others read this page, or will by its hash: writing past a fork or a truncation needs a copy."""
        return self._refs[page] > 1 or self._hash_of[page] is not None

    def advance(self, seq: str, num_tokens: int) -> None:
        state = self._seqs[seq]
        if not self.prefix_caching or num_tokens // self._tokens_per_page <= len(state.hashes):
            return
        size = self._tokens_per_page
        for index in range(len(state.hashes), num_tokens // size):
            parent = state.hashes[-1] if state.hashes else state.root
            key = page_hash(parent, state.token_ids[index * size : (index + 1) * size])
            state.hashes.append(key)
            self._register(state, index, key)

    def _register(self, state: _Sequence, index: int, key: bytes) -> None:
        page = state.pages[index]
        canonical = self._page_of.get(key)
        if canonical is None:
            self._name(page, key)
        elif canonical != page:
            # Computed twice (a prompt that is a whole number of pages recomputes its last one). The cache stays
            # prefix-closed for what follows if this sequence holds the canonical page, or makes its own that.
            if self._refs[canonical] == 0:
                self._rename(canonical, page)
            else:
                self._refs[canonical] += 1
                state.shadow[index] = canonical

    def _rename(self, canonical: int, page: int) -> None:
        """`page` takes the place of a page with the same content that nobody reads."""
        key = self._hash_of[canonical]
        assert key is not None and self._refs[canonical] == 0
        self._unhash(canonical)
        del self._cached[canonical]
        self._free.append(canonical)
        self._name(page, key)

    def _drop_shadows(self, state: _Sequence) -> None:
        """Give back the canonical pages that only this sequence holds, its own taking their place."""
        for index in self._spare(state):
            canonical = state.shadow.pop(index)
            self._release(canonical)
            self._rename(canonical, state.pages[index])

    def _spare(self, state: _Sequence) -> list[int]:
        return [index for index, page in state.shadow.items() if self._refs[page] == 1]

    def can_fork(self, parent: str, num_tokens: int) -> bool:
        source = self._seqs[parent]
        return source.host is None and num_tokens <= source.length

    def fork(self, parent: str, child: str, token_ids: Sequence[int], num_tokens: int) -> None:
        source = self._seqs[parent]
        assert child not in self._seqs and num_tokens <= source.length and source.host is None
        state = _Sequence(token_ids, source.root)
        state.pages = source.pages[: self.pages_for(num_tokens)]
        for page in state.pages:
            self._refs[page] += 1
        full = num_tokens // self._tokens_per_page
        state.hashes = source.hashes[:full]
        for index, canonical in source.shadow.items():
            if index < full:
                self._reference(canonical)
                state.shadow[index] = canonical
        state.length = num_tokens
        state.cow = source.cow = True
        self._seqs[child] = state

    # -- shrinking -----------------------------------------------------------------------------------------

    def truncate(self, seq: str, num_tokens: int) -> tuple[int, ...]:
        state = self._seqs[seq]
        assert state.host is None
        if num_tokens >= state.length:
            return (len(state.pages),)
        # A page that keeps its hash here is copied before it is written again: see _read_only.
        full = num_tokens // self._tokens_per_page
        while len(state.hashes) > full:  # deepest first, so that the cache stays prefix-closed
            state.hashes.pop()
            if len(state.hashes) in state.shadow:
                self._release(state.shadow.pop(len(state.hashes)))
        keep = self.pages_for(num_tokens)
        while len(state.pages) > keep:
            self._release(state.pages.pop())
        state.length = num_tokens
        state.cow = True
        return (len(state.pages),)

    def preempt(self, seq: str) -> None:
        self._drop(self._seqs.pop(seq))

    def end(self, seq: str) -> None:
        state = self._seqs.pop(seq, None)
        if state is not None:
            self._drop(state)

    def _drop(self, state: _Sequence) -> None:
        if state.host is not None:
            self._host_free.extend(reversed(state.host))
        for index in range(len(state.pages) - 1, -1, -1):
            page = state.pages[index]
            if index in state.shadow:
                self._release(state.shadow[index])
            self._release(page)

    # -- swapping ------------------------------------------------------------------------------------------

    def swap_out(self, seq: str) -> list[PageCopy] | None:
        state = self._seqs[seq]
        assert state.host is None
        if len(state.pages) > len(self._host_free):
            return None
        host = [self._host_free.pop() for _ in state.pages]
        units = self._units
        copies = [PageCopy(page * units, slot * units) for page, slot in zip(state.pages, host, strict=True)]
        self._drop(state)
        state.pages, state.shadow, state.host = [], {}, host
        return copies

    def swap_in(self, seq: str, target: int = 0) -> list[PageCopy]:
        state = self._seqs[seq]
        assert state.host is not None
        # A page that is still in the cache needs no copy.
        resident = [self._page_of.get(key) for key in state.hashes]
        resident += [None] * (len(state.host) - len(resident))
        new = resident.count(None)
        have = self.available() - sum(1 for page in resident if page is not None and self._refs[page] == 0)
        if new > have:
            raise OutOfPages(new, have, self.groups[0].name)
        for page in resident:
            if page is not None:
                self._reference(page)
        state.pages = [self._take() if page is None else page for page in resident]
        units, copies = self._units, []
        for index, (page, slot) in enumerate(zip(state.pages, state.host, strict=True)):
            if resident[index] is None:
                copies.append(PageCopy(slot * units, page * units))
                if index < len(state.hashes):
                    self._register(state, index, state.hashes[index])
        self._host_free.extend(reversed(state.host))
        state.host = None
        return copies

    # -- handing over --------------------------------------------------------------------------------------

    def lent(self, seq: str, num_tokens: int) -> Entries:
        pages = self._seqs[seq].pages[: self.pages_for(num_tokens)]
        return (tuple([page * self._units for page in pages]),)

    def receive(
        self, seq: str, token_ids: Sequence[int], num_tokens: int, *, salt: str = "", headroom: int = 0
    ) -> Entries:
        assert seq not in self._seqs and 0 < num_tokens <= len(token_ids)
        new = self.pages_for(num_tokens)
        if new + headroom > self.available():
            raise OutOfPages(new + headroom, self.available(), self.groups[0].name)
        state = _Sequence(token_ids, root_hash(salt) if self.prefix_caching else b"")
        state.pages = [self._take() for _ in range(new)]
        state.length = num_tokens
        self._seqs[seq] = state
        return self.lent(seq, num_tokens)

    # -- pages ---------------------------------------------------------------------------------------------

    def _take(self) -> int:
        """A page of one's own. The caller has made sure that there is one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unhash(page)
        self._refs[page] = 1
        return page

    def _reference(self, page: int) -> None:
        if self._refs[page] == 0:
            del self._cached[page]
        self._refs[page] += 1

    def _release(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if self._hash_of[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def _name(self, page: int, key: bytes) -> None:
        self._page_of[key] = page
        self._hash_of[page] = key

    def _unhash(self, page: int) -> None:
        key = self._hash_of[page]
        assert key is not None
        del self._page_of[key]
        self._hash_of[page] = None

    def reset_cache(self) -> bool:
        if len(self._free) + len(self._cached) < self.num_pages:
            return False
        for page in self._cached:
            self._unhash(page)
            self._free.append(page)
        self._cached.clear()
        return True

    # -- accounts ------------------------------------------------------------------------------------------

    def usage(self) -> tuple[int, int]:
        return self.num_pages - self.available(), len(self._cached)

    def sharing(self) -> float:
        """Part of the pages that the tables name together which sharing saves, 0 to 1 (PagedAttention,
        figure 15)."""
        named = sum(len(state.pages) for state in self._seqs.values())
        unique = len({page for state in self._seqs.values() for page in state.pages})
        return 1 - unique / named if named else 0.0

    def ledger(self) -> Ledger:
        group, page_bytes = self.groups[0], self.groups[0].page_bytes
        filled: dict[int, int] = {}  # live page -> slots that hold tokens
        for state in self._seqs.values():
            for index, page in enumerate(state.pages):
                slots = min(self._tokens_per_page, state.length - index * self._tokens_per_page)
                filled[page] = max(filled.get(page, 0), slots)
            for page in state.shadow.values():
                filled[page] = self._tokens_per_page
        live = len(filled)
        tokens = sum(filled.values()) * group.bytes_per_token
        padding = live * (page_bytes - group.payload_bytes)
        return Ledger(
            arena=self.num_pages * page_bytes,
            tokens=tokens,
            tail=live * page_bytes - padding - tokens,
            cached=len(self._cached) * page_bytes,
            padding=padding,
            free=len(self._free) * page_bytes,
            pages_total=self.num_pages,
            pages_used=live,
            pages_cached=len(self._cached),
            pages_shared=sum(1 for refs in self._refs if refs > 1),
        )

    def bill(self, seq: str) -> dict[str, int]:
        state, group = self._seqs[seq], self.groups[0]
        pages = len(state.pages)
        tokens = state.length * group.bytes_per_token
        padding = pages * (group.page_bytes - group.payload_bytes)
        return {
            "tokens": tokens,
            "tail": pages * group.page_bytes - padding - tokens,
            "padding": padding,
            "shared": sum(self._refs[page] > 1 for page in state.pages) * group.page_bytes,
        }

    def check(self) -> None:
        refs = [0] * self.num_pages
        host: list[int] = list(self._host_free)
        for state in self._seqs.values():
            for page in (*state.pages, *state.shadow.values()):
                refs[page] += 1
            if state.host is None:
                assert len(state.pages) == self.pages_for(state.length), "table length"
                assert len(set(state.pages)) == len(state.pages), "a page twice in one table"
            else:
                assert not state.pages
                host += state.host
            self._check_chain(state)
        assert refs == self._refs, "reference counts"
        assert sorted(host) == list(range(self.host_pages)), "host pages"
        used = [page for page in range(self.num_pages) if refs[page]]
        assert sorted([*self._free, *self._cached, *used]) == list(range(self.num_pages)), "pages conserve"
        assert all(self._hash_of[page] is None for page in self._free)
        hashed = {key: page for page, key in enumerate(self._hash_of) if key is not None}
        assert hashed == self._page_of and all(self._hash_of[page] for page in self._cached)
        ledger = self.ledger()
        parts = (ledger.tokens, ledger.tail, ledger.cached, ledger.padding, ledger.free)
        assert min(parts) >= 0 and sum(parts) == ledger.arena, "ledger"

    def _check_chain(self, state: _Sequence) -> None:
        parent, size = state.root, self._tokens_per_page
        for index, key in enumerate(state.hashes):
            parent = page_hash(parent, state.token_ids[index * size : (index + 1) * size])
            assert key == parent, "hash chain"
            if state.host is None:
                page = state.shadow.get(index, state.pages[index])
                assert self._page_of[key] == page, "canonical page"
