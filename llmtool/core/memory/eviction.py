"""Pages that nobody uses, in the order in which they go: by class, last read first of all to stay, and of pages
last read together the deepest in its prefix goes first (Jenga: balanced and aligned eviction)."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

CLASSES = 5

Key = tuple[int, int, int]  # class, last access, minus depth


class EvictionQueue:
    """items: how many there may be, numbered. Of an item out of the queue the key is None. Heaps hold stale
    entries: one counts only while it says what the item's key says."""

    def __init__(self, items: int) -> None:
        self.keys: list[Key | None] = [None] * items
        self._heaps: list[list[tuple[int, int, int]]] = [[] for _ in range(CLASSES)]  # access, -depth, item
        self._limit = 4 * items + 64

    def put(self, item: int, key: Key) -> None:
        self.keys[item] = key
        heap = self._heaps[key[0]]
        heappush(heap, (key[1], key[2], item))
        if len(heap) > self._limit:  # stale entries must not pile up
            heap[:] = {(k[1], k[2], i) for i, k in enumerate(self.keys) if k is not None and k[0] == key[0]}
            heapify(heap)

    def drop(self, item: int) -> None:
        self.keys[item] = None

    def first(self, order: Sequence[int]) -> int | None:
        """The item to go next. order: a number per class; of equal ones the items are compared."""
        best: tuple[int, int, int, int] | None = None
        for rank, heap in enumerate(self._heaps):
            while heap and self.keys[heap[0][2]] != (rank, heap[0][0], heap[0][1]):
                heappop(heap)
            if heap and (best is None or (order[rank], *heap[0]) < best):
                best = (order[rank], *heap[0])
        return None if best is None else best[3]

    def pop(self, order: Sequence[int]) -> int | None:
        """Take it out."""
        item = self.first(order)
        if item is not None:
            self.keys[item] = None
        return item
