"""The two-level page allocator: large pages that any layer type may own, small pages of one type in them
(Jenga: LCM large pages, request-aware allocation in five steps).

A small page is empty, used (its reference count says by how many) or evictable (unreferenced, its content kept for
its prefix). A large page whose small pages are all empty goes back to the first level. `take` follows Jenga's five
steps for every small page, but for all types of a request at once: all or nothing, and never spending a large page
on one type that another type of the same demand cannot do without.

Pages are ints, `large * width + slot`; `entry` turns one into its block-table entry. Nothing here knows tokens,
hashes or sequences, and time is what the caller says it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmtool.core.memory import arena_accounts as accounts
from llmtool.core.memory.arena_pages import SmallPages, Taken
from llmtool.core.memory.eviction import CLASSES, EvictionQueue, Key
from llmtool.core.memory.geometry import UNIT
from llmtool.core.memory.page_plan import PagePlan


class Arena:
    """types: what small pages there are. num_large: large pages of `large_page` bytes."""

    def __init__(self, types: Sequence[SmallPages], large_page: int, num_large: int) -> None:
        assert num_large >= 1 and large_page % UNIT == 0
        for kind in types:
            assert kind.stride % UNIT == 0 and 1 <= kind.per_large <= large_page // kind.stride, kind
        self.types = tuple(types)
        self.large_page = large_page
        self.num_large = num_large
        self.width = max(kind.per_large for kind in types)
        self._per_large = [kind.per_large for kind in types]
        self._full_mask = [(1 << kind.per_large) - 1 for kind in types]
        self._owner = [-1] * num_large  # type, -1: empty
        self._request: list[str | None] = [None] * num_large
        self._empty = [0] * num_large  # bitmask of empty slots, of owned large pages
        self._used = [0] * num_large  # referenced slots
        self._refs = [0] * (num_large * self.width)
        self._keys: list[Key] = [(0, 0, 0)] * (num_large * self.width)  # of evictable pages
        self._evictable = [0] * num_large  # bitmask of evictable slots
        self._free = list(range(num_large - 1, -1, -1))  # a stack: low pages first
        self._partial: list[dict[int, None]] = [{} for _ in types]  # large pages with empty slots
        self._mine: dict[tuple[int, str], dict[int, None]] = {}  # the same, by request
        # Large pages with no used slot, empty ones included, and per type the slots of the others that are not
        # used: together they say exactly what can be had (see `fits`).
        self._reclaimable = num_large
        self._in_place = [0] * len(self.types)
        # Evictable pages in large pages that are in use, per type, and large pages that are not.
        # What is not in its queue yet, or with a key of old, lies in a large page of `_unsorted`; entries of small
        # pages that are no longer to be had are passed over.
        self._unsorted: list[dict[int, None]] = [{} for _ in types]
        self._small = [EvictionQueue(num_large * self.width if k.per_large > 1 else 0) for k in types]
        self._large = EvictionQueue(num_large)
        self.order: Sequence[int] = range(CLASSES)  # of classes: lower ones go first, equal ones by access

    @classmethod
    def of(cls, plan: PagePlan, num_large: int) -> Arena:
        """An arena for a page plan whose large pages serve all types (not `static`)."""
        assert plan.mode != "static"
        pools = [SmallPages(pool.type.name, pool.stride, pool.per_large) for pool in plan.pools]
        return cls(pools, plan.large_page, num_large)

    # -- questions -----------------------------------------------------------------------------------------

    def entry(self, page: int) -> int:
        """The block-table entry: the page's offset in the arena in UNIT bytes."""
        large, slot = divmod(page, self.width)
        return (large * self.large_page + slot * self.types[self._owner[large]].stride) // UNIT

    def references(self, page: int) -> int:
        return self._refs[page]

    def is_evictable(self, page: int) -> bool:
        large, slot = divmod(page, self.width)
        return bool(self._evictable[large] >> slot & 1)

    def kind_of(self, page: int) -> int:
        """The layer type of a page that is not empty."""
        return self._owner[page // self.width]

    def num_evictable(self) -> int:
        return sum(mask.bit_count() for mask in self._evictable)

    @property
    def reclaimable(self) -> int:
        """Large pages that hold nothing that is in use."""
        return self._reclaimable

    @property
    def num_free(self) -> int:
        """Large pages that hold nothing."""
        return len(self._free)

    def is_alone(self, page: int, pages: int) -> bool:
        """Whether the page's large page has no more than `pages` small pages in use."""
        return self._used[page // self.width] <= pages

    def fits(self, wants: Sequence[int]) -> bool:
        """Would `take` succeed? wants: small pages per type."""
        return self.large_needed(wants) <= self._reclaimable

    def large_needed(self, wants: Sequence[int]) -> int:
        """Large pages that `take` must find beside what large pages in use have room for."""
        needed, in_place = 0, self._in_place
        for kind, want in enumerate(wants):
            lack = want - in_place[kind]
            if lack > 0:
                needed -= -lack // self._per_large[kind]
        return needed

    # -- taking --------------------------------------------------------------------------------------------

    def take(self, wants: Sequence[int], request: str) -> Taken:
        """`wants[t]` small pages of every type t, each with one reference. Raises OutOfPages and changes nothing;
        it names the type that lacks most large pages."""
        if self.large_needed(wants) > self._reclaimable:
            raise accounts.refusal(self, wants)
        left = list(wants)
        evicted: list[int] = []
        pages: list[tuple[int, ...]] = []
        for kind, want in enumerate(wants):
            if not want:
                pages.append(())
                continue
            got: list[int] = []
            if self._full_mask[kind] == 1:
                self._open(kind, request, want, got, evicted)
                left[kind] = 0
            while left[kind]:
                self._fill(kind, request, left, got)
                if left[kind]:
                    got.append(self._take_one(kind, request, left, evicted))
                    left[kind] -= 1
            pages.append(tuple(got))
        return Taken(tuple(pages), tuple(evicted))

    def _open(self, kind: int, request: str, want: int, got: list[int], evicted: list[int]) -> None:
        """Large pages that are one small page each: steps 2 and 3 are all there is."""
        owner, requests, used, refs = self._owner, self._request, self._used, self._refs
        for _ in range(want):
            large = self._free.pop() if self._free else self._evict_large(evicted)
            assert large is not None
            owner[large], requests[large], used[large], self._empty[large] = kind, request, 1, 0
            page = large * self.width
            refs[page] = 1
            got.append(page)
        self._reclaimable -= want

    def _fill(self, kind: int, request: str, left: list[int], got: list[int]) -> None:
        """Step 1, as far as it goes: empty small pages in large pages of this request that are in use."""
        mine = self._mine.get((kind, request))
        for large in list(mine) if mine else ():
            if not left[kind]:
                return
            if not self._used[large]:
                continue
            mask, first, refs, count = self._empty[large], large * self.width, self._refs, 0
            while mask and count < left[kind]:
                low = mask & -mask
                mask ^= low
                page = first + low.bit_length() - 1
                refs[page] = 1
                got.append(page)
                count += 1
            self._empty[large] = mask
            if not mask:
                self._unlist(large)
            self._used[large] += count
            self._in_place[kind] -= count
            left[kind] -= count

    def _take_one(self, kind: int, request: str, left: list[int], evicted: list[int]) -> int:
        # Step 1: an empty small page in a large page of this request.
        mine = self._mine.get((kind, request), {})
        for large in mine:
            if self._used[large]:
                return self._use_empty(large)
        # May this page open a large page that nobody uses, and the rest of the demand still be met?
        opens = left[kind] > self._in_place[kind] or self.large_needed(left) < self._reclaimable
        if opens and mine:
            return self._use_empty(next(iter(mine)))
        if opens:
            # Step 2: an empty large page. Step 3: the least recently used evictable one.
            opened = self._free.pop() if self._free else self._evict_large(evicted)
            if opened is not None:
                self._own(opened, kind, request)
                return self._use_empty(opened)
        # Step 4: any empty small page of the type, in pages in use first: the others may become whole again.
        for large in self._partial[kind]:
            if self._used[large]:
                return self._use_empty(large)
        # Step 5: the least recently used evictable small page of the type.
        return self._evict_small(kind, evicted)

    def _own(self, large: int, kind: int, request: str) -> None:
        self._owner[large], self._request[large] = kind, request
        self._empty[large] = self._full_mask[kind]
        self._list(large)

    def _list(self, large: int) -> None:
        kind, request = self._owner[large], self._request[large]
        assert request is not None
        self._partial[kind][large] = None
        self._mine.setdefault((kind, request), {})[large] = None

    def _unlist(self, large: int) -> None:
        kind, request = self._owner[large], self._request[large]
        assert request is not None
        self._partial[kind].pop(large, None)
        mine = self._mine.get((kind, request))
        if mine is not None:
            mine.pop(large, None)
            if not mine:
                del self._mine[kind, request]

    def _use_empty(self, large: int) -> int:
        mask = self._empty[large]
        low = mask & -mask
        self._empty[large] = mask ^ low
        if mask == low:
            self._unlist(large)
        page = large * self.width + low.bit_length() - 1
        self._reference_first(page, large)
        return page

    def _reference_first(self, page: int, large: int) -> None:
        self._refs[page] = 1
        kind = self._owner[large]
        if self._used[large] == 0:
            self._reclaimable -= 1
            self._in_place[kind] += self.types[kind].per_large
            self._large.drop(large)
            if self._evictable[large]:
                self._unsorted[kind][large] = None
        self._used[large] += 1
        self._in_place[kind] -= 1

    # -- evicting ------------------------------------------------------------------------------------------

    def _evictable_pages(self, large: int) -> list[int]:
        mask, first, found = self._evictable[large], large * self.width - 1, []
        while mask:
            low = mask & -mask
            found.append(first + low.bit_length())
            mask ^= low
        return found

    def _queue_large(self, large: int) -> None:
        """A large page counts by the last access to any of its small pages, and by the deepest of those."""
        keys = [self._keys[page] for page in self._evictable_pages(large)]
        if keys:
            last = max((rank, access) for rank, access, _ in keys)
            self._large.put(large, (*last, min(k[2] for k in keys if k[:2] == last)))
        else:
            self._large.drop(large)

    def _evict_large(self, evicted: list[int]) -> int | None:
        """Balanced eviction: across types; `order` says which classes go first."""
        large = self._large.pop(self.order)
        if large is not None:
            evicted.extend(self._evictable_pages(large))
            self._evictable[large] = 0
            if self._empty[large]:
                self._unlist(large)
        return large

    def next_key(self, count: int) -> Key | None:
        """The key of the large page that would go next, if `count` were taken; None while so many are free."""
        if len(self._free) >= count:
            return None
        large = self._large.first(self.order)
        return None if large is None else self._large.keys[large]

    def _evict_small(self, kind: int, evicted: list[int]) -> int:
        queue = self._small[kind]
        for large in self._unsorted[kind]:
            for page in self._evictable_pages(large) if self._owner[large] == kind else ():
                queue.put(page, self._keys[page])
        self._unsorted[kind].clear()
        while True:
            taken = queue.pop(self.order)
            assert taken is not None
            page, (large, slot) = taken, divmod(taken, self.width)
            if self._owner[large] == kind and self._used[large] and self._evictable[large] >> slot & 1:
                break
        self._evictable[large] &= ~(1 << slot)
        evicted.append(page)
        self._reference_first(page, large)
        return page

    # -- references ----------------------------------------------------------------------------------------

    def hold(self, page: int) -> None:
        """One more reference to a used or evictable page."""
        refs = self._refs
        if refs[page]:
            refs[page] += 1
            return
        large, slot = divmod(page, self.width)
        assert self._evictable[large] >> slot & 1, "an empty page has nothing to hold"
        self._evictable[large] &= ~(1 << slot)
        self._reference_first(page, large)

    def hold_all(self, pages: Sequence[int]) -> None:
        """One more reference to each."""
        refs, hold = self._refs, self.hold
        for page in pages:
            if refs[page]:
                refs[page] += 1
            else:
                hold(page)

    def adopt(self, page: int, request: str) -> str:
        """What is empty in the page's large page is `request`'s now, which goes on from there. Returns whose it
        was."""
        large = page // self.width
        before = self._request[large]
        assert before is not None
        if self._empty[large]:
            self._unlist(large)
            self._request[large] = request
            self._list(large)
        return before

    def release(self, page: int, now: int, depth: int = 0, keep: bool = True, rank: int = 0) -> None:
        """One reference less. The last one leaves the page evictable, last read at `now`, `depth` tokens into its
        prefix, of class `rank`, or empty when `keep` is False."""
        refs = self._refs[page] - 1
        assert refs >= 0
        self._refs[page] = refs
        if not refs:
            self._unuse(page, (rank, now, -depth) if keep else None)

    def unhold(self, page: int) -> None:
        """Take back a `hold`: the page is as recently used as it was before."""
        self._refs[page] -= 1
        if not self._refs[page]:
            self._unuse(page, self._keys[page])

    def _unuse(self, page: int, key: Key | None) -> None:
        large, slot = divmod(page, self.width)
        kind = self._owner[large]
        used = self._used[large] = self._used[large] - 1
        alone = self._full_mask[kind] == 1
        if used:
            self._in_place[kind] += 1
        else:
            self._reclaimable += 1
            self._in_place[kind] += 1 - self.types[kind].per_large
        if key is None:
            self._clear(large, slot)
        else:
            self._evictable[large] |= 1 << slot
            self._keys[page] = key
            if alone:
                self._large.put(large, key)
                return
            if used:
                self._unsorted[kind][large] = None
        if not used and self._owner[large] >= 0:
            self._queue_large(large)

    def key(self, page: int) -> Key:
        """Class, last access and minus depth, of a page that is or was evictable."""
        return self._keys[page]

    def touch(self, page: int, now: int, rank: int) -> None:
        """An evictable page counts as read at `now`, and is of class `rank`."""
        large, slot = divmod(page, self.width)
        assert self._evictable[large] >> slot & 1
        self._keys[page] = (rank, now, self._keys[page][2])
        if self._used[large]:
            self._unsorted[self._owner[large]][large] = None
        else:
            self._queue_large(large)

    def forget(self, page: int) -> None:
        """An evictable page becomes empty."""
        large, slot = divmod(page, self.width)
        assert self._evictable[large] >> slot & 1
        self._evictable[large] &= ~(1 << slot)
        self._clear(large, slot)
        if self._owner[large] >= 0 and not self._used[large]:
            self._queue_large(large)

    def _clear(self, large: int, slot: int) -> None:
        if not self._empty[large]:
            self._list(large)
        self._empty[large] |= 1 << slot
        if self._empty[large] == self._full_mask[self._owner[large]]:
            self._unlist(large)
            self._owner[large], self._request[large], self._empty[large] = -1, None, 0
            self._free.append(large)
            self._large.drop(large)

    def ledger(self) -> dict[str, int]:
        """Bytes by what they hold; they sum to the arena. empty: unused slots of large pages that have
        others. padding: what no slot of a large page reaches. free: large pages nobody owns."""
        return accounts.ledger(self)

    def check(self) -> None:
        """Assert every invariant."""
        accounts.check(self)
