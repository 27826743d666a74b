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
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.geometry import UNIT
from llmtool.core.memory.page_plan import PagePlan


@dataclass(frozen=True, slots=True)
class SmallPages:
    """One layer type's small pages. stride: bytes between them, a multiple of UNIT; per_large: how many fit."""

    name: str
    stride: int
    per_large: int


@dataclass(frozen=True, slots=True)
class Taken:
    """pages: per type, in the order asked for. evicted: pages whose content is gone, which may be among `pages`."""

    pages: tuple[tuple[int, ...], ...]
    evicted: tuple[int, ...]


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
        self._full_mask = [(1 << kind.per_large) - 1 for kind in types]
        self._owner = [-1] * num_large  # type, -1: empty
        self._request: list[str | None] = [None] * num_large
        self._empty = [0] * num_large  # bitmask of empty slots, of owned large pages
        self._used = [0] * num_large  # referenced slots
        self._refs = [0] * (num_large * self.width)
        self._access = [0] * (num_large * self.width)
        self._depth = [0] * (num_large * self.width)
        self._evictable = [0] * num_large  # bitmask of evictable slots
        self._free = list(range(num_large - 1, -1, -1))  # a stack: low pages first
        self._partial: list[dict[int, None]] = [{} for _ in types]  # large pages with empty slots
        self._mine: dict[tuple[int, str], dict[int, None]] = {}  # the same, by request
        # Large pages with no used slot, empty ones included, and per type the slots of the others that are not
        # used: together they say exactly what can be had (see `fits`).
        self._reclaimable = num_large
        self._in_place = [0] * len(self.types)
        # Heaps with stale entries: one counts only while it says what the page says.
        self._small_lru: list[list[tuple[int, int, int]]] = [[] for _ in types]  # access, -depth, page
        self._large_lru: list[tuple[int, int, int]] = []  # last access, -depth, large page

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

    def available(self, kind: int) -> int:
        """Small pages of one type that could be had if no other type wanted any."""
        return self._in_place[kind] + self._reclaimable * self.types[kind].per_large

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
        return sum(
            -(-max(0, want - here) // kind.per_large)
            for want, here, kind in zip(wants, self._in_place, self.types, strict=True)
        )

    # -- taking --------------------------------------------------------------------------------------------

    def take(self, wants: Sequence[int], request: str) -> Taken:
        """`wants[t]` small pages of every type t, each with one reference. Raises OutOfPages and changes nothing;
        it names the type that lacks most large pages."""
        if not self.fits(wants):
            self._refuse(wants)
        left = list(wants)
        evicted: list[int] = []
        pages: list[tuple[int, ...]] = []
        for kind, want in enumerate(wants):
            got = []
            for _ in range(want):
                got.append(self._take_one(kind, request, left, evicted))
                left[kind] -= 1
            pages.append(tuple(got))
        return Taken(tuple(pages), tuple(evicted))

    def _refuse(self, wants: Sequence[int]) -> None:
        lack = [
            -(-max(0, want - here) // kind.per_large)
            for want, here, kind in zip(wants, self._in_place, self.types, strict=True)
        ]
        binding = lack.index(max(lack))
        # Large pages that the other types need are not there for this one.
        spare = max(0, self._reclaimable - (sum(lack) - lack[binding]))
        have = self._in_place[binding] + spare * self.types[binding].per_large
        raise OutOfPages(wants[binding], have, self.types[binding].name)

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
        self._used[large] += 1
        self._in_place[kind] -= 1

    # -- evicting ------------------------------------------------------------------------------------------

    def _age(self, large: int) -> tuple[int, int]:
        """The last access to any evictable page of a large page, and its depth, deepest first."""
        first, mask = large * self.width, self._evictable[large]
        last, depth = -(1 << 62), 0
        while mask:
            low = mask & -mask
            page = first + low.bit_length() - 1
            if self._access[page] > last:
                last, depth = self._access[page], self._depth[page]
            elif self._access[page] == last:
                depth = max(depth, self._depth[page])
            mask ^= low
        return last, -depth

    def _evict_large(self, evicted: list[int]) -> int | None:
        """Balanced eviction: across types, by the last access to any of a large page's small pages; of those last
        read together the deepest goes first."""
        while self._large_lru:
            when, depth, large = heappop(self._large_lru)
            if self._used[large] == 0 and self._evictable[large] and self._age(large) == (when, depth):
                first, mask = large * self.width, self._evictable[large]
                evicted.extend(first + slot for slot in range(self.width) if mask >> slot & 1)
                self._evictable[large] = 0
                self._unlist(large)
                return large
        return None

    def _evict_small(self, kind: int, evicted: list[int]) -> int:
        """Aligned eviction: of pages last read together the deepest in its prefix goes first, in every type."""
        heap, skipped = self._small_lru[kind], []
        while True:
            item = heappop(heap)
            access, depth, page = item
            large, slot = divmod(page, self.width)
            current = (access, depth) == (self._access[page], -self._depth[page])
            if not current or self._owner[large] != kind or not self._evictable[large] >> slot & 1:
                continue
            if self._used[large]:
                break
            skipped.append(item)  # in a large page that is wanted whole
        for item in skipped:
            heappush(heap, item)
        self._evictable[large] &= ~(1 << slot)
        evicted.append(page)
        self._reference_first(page, large)
        return page

    # -- references ----------------------------------------------------------------------------------------

    def hold(self, page: int) -> None:
        """One more reference to a used or evictable page."""
        large, slot = divmod(page, self.width)
        if self._refs[page]:
            self._refs[page] += 1
            return
        assert self._evictable[large] >> slot & 1, "an empty page has nothing to hold"
        self._evictable[large] &= ~(1 << slot)
        self._reference_first(page, large)

    def release(self, page: int, now: int, depth: int = 0, keep: bool = True) -> None:
        """One reference less. The last one leaves the page evictable, last read at `now`, `depth` tokens into its
        prefix, or empty when `keep` is False."""
        assert self._refs[page] > 0
        self._refs[page] -= 1
        if self._refs[page]:
            return
        large, slot = divmod(page, self.width)
        kind = self._owner[large]
        self._used[large] -= 1
        self._in_place[kind] += 1
        if self._used[large] == 0:
            self._reclaimable += 1
            self._in_place[kind] -= self.types[kind].per_large
        if keep:
            self._evictable[large] |= 1 << slot
            self._access[page], self._depth[page] = now, depth
            self._push(self._small_lru[kind], (now, -depth, page))
        else:
            self._clear(large, slot)
        if self._used[large] == 0 and self._evictable[large]:
            self._push_large(large)

    def unhold(self, page: int) -> None:
        """Take back a `hold`: the page is as recently used as it was before."""
        self.release(page, self._access[page], self._depth[page])

    def forget(self, page: int) -> None:
        """An evictable page becomes empty."""
        large, slot = divmod(page, self.width)
        assert self._evictable[large] >> slot & 1
        self._evictable[large] &= ~(1 << slot)
        self._clear(large, slot)
        if self._used[large] == 0 and self._evictable[large]:
            self._push_large(large)

    def _clear(self, large: int, slot: int) -> None:
        if not self._empty[large]:
            self._list(large)
        self._empty[large] |= 1 << slot
        if self._empty[large] == self._full_mask[self._owner[large]]:
            self._unlist(large)
            self._owner[large], self._request[large], self._empty[large] = -1, None, 0
            self._free.append(large)

    def _push(self, heap: list[tuple[int, int, int]], item: tuple[int, int, int]) -> None:
        heappush(heap, item)
        if len(heap) > 4 * self.num_large * self.width + 64:  # stale entries must not pile up
            heap[:] = {i for i in heap if (i[0], i[1]) == (self._access[i[2]], -self._depth[i[2]])}
            heapify(heap)

    def _push_large(self, large: int) -> None:
        heappush(self._large_lru, (*self._age(large), large))
        if len(self._large_lru) > 4 * self.num_large + 64:
            idle = [n for n in range(self.num_large) if self._evictable[n] and not self._used[n]]
            self._large_lru = [(*self._age(n), n) for n in idle]
            heapify(self._large_lru)

    # -- accounts ------------------------------------------------------------------------------------------

    def ledger(self) -> dict[str, int]:
        """Bytes by what they hold; they sum to the arena. empty: unused slots of large pages that have
        others. padding: what no slot of a large page reaches. free: large pages nobody owns."""
        parts = dict.fromkeys(("used", "evictable", "empty", "padding", "free"), 0)
        for large, owner in enumerate(self._owner):
            if owner < 0:
                parts["free"] += self.large_page
                continue
            kind = self.types[owner]
            parts["used"] += self._used[large] * kind.stride
            parts["evictable"] += self._evictable[large].bit_count() * kind.stride
            parts["empty"] += self._empty[large].bit_count() * kind.stride
            parts["padding"] += self.large_page - kind.per_large * kind.stride
        return parts

    def check(self) -> None:
        """Assert every invariant."""
        in_place, reclaimable = [0] * len(self.types), 0
        for large, owner in enumerate(self._owner):
            refs = self._refs[large * self.width : (large + 1) * self.width]
            used = sum(count > 0 for count in refs)
            assert used == self._used[large], "used slots"
            reclaimable += used == 0
            if owner < 0:
                assert not (used or self._empty[large] or self._evictable[large]), "an owner of nothing"
                continue
            mask = sum(1 << slot for slot, count in enumerate(refs) if count)
            states = (mask, self._empty[large], self._evictable[large])
            assert sum(states) == states[0] | states[1] | states[2] == self._full_mask[owner], (
                "slots conserve"
            )
            assert self._empty[large] != self._full_mask[owner], "a wholly empty page is free"
            assert (large in self._partial[owner]) == bool(self._empty[large])
            request = self._request[large]
            assert request is not None
            assert (large in self._mine.get((owner, request), ())) == bool(self._empty[large])
            if used:
                in_place[owner] += self.types[owner].per_large - used
        assert (in_place, reclaimable) == (self._in_place, self._reclaimable), "what can be had"
        assert sorted(self._free) == [n for n, owner in enumerate(self._owner) if owner < 0], "free pages"
        assert sum(self.ledger().values()) == self.num_large * self.large_page, "ledger"
