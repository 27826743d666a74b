"""The arena's accounts: what its bytes hold, and that everything adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtool.core.memory.allocator import OutOfPages

if TYPE_CHECKING:
    from llmtool.core.memory.arena import Arena


def refusal(a: Arena, wants: Sequence[int]) -> OutOfPages:
    """Names the type that lacks most large pages."""
    lack = [
        -(-max(0, want - here) // kind.per_large)
        for want, here, kind in zip(wants, a._in_place, a.types, strict=True)
    ]
    binding = lack.index(max(lack))
    # Large pages that the other types need are not there for this one.
    spare = max(0, a._reclaimable - (sum(lack) - lack[binding]))
    have = a._in_place[binding] + spare * a.types[binding].per_large
    return OutOfPages(wants[binding], have, a.types[binding].name)


def ledger(a: Arena) -> dict[str, int]:
    parts = dict.fromkeys(("used", "evictable", "empty", "padding", "free"), 0)
    for large, owner in enumerate(a._owner):
        if owner < 0:
            parts["free"] += a.large_page
            continue
        kind = a.types[owner]
        parts["used"] += a._used[large] * kind.stride
        parts["evictable"] += a._evictable[large].bit_count() * kind.stride
        parts["empty"] += a._empty[large].bit_count() * kind.stride
        parts["padding"] += a.large_page - kind.per_large * kind.stride
    return parts


def check(a: Arena) -> None:
    in_place, reclaimable = [0] * len(a.types), 0
    for large, owner in enumerate(a._owner):
        refs = a._refs[large * a.width : (large + 1) * a.width]
        used = sum(count > 0 for count in refs)
        assert used == a._used[large], "used slots"
        reclaimable += used == 0
        if owner < 0:
            assert not (used or a._empty[large] or a._evictable[large]), "an owner of nothing"
            continue
        mask = sum(1 << slot for slot, count in enumerate(refs) if count)
        states = (mask, a._empty[large], a._evictable[large])
        assert sum(states) == states[0] | states[1] | states[2] == a._full_mask[owner], "slots conserve"
        assert a._empty[large] != a._full_mask[owner], "a wholly empty page is free"
        assert (large in a._partial[owner]) == bool(a._empty[large])
        request = a._request[large]
        assert request is not None
        assert (large in a._mine.get((owner, request), ())) == bool(a._empty[large])
        if used and large not in a._unsorted[owner]:
            for page in a._evictable_pages(large):
                assert a._small[owner].keys[page] == a._keys[page], "small pages to evict"
        assert (a._large.keys[large] is not None) == (not used), "large pages to evict"
        if used:
            in_place[owner] += a.types[owner].per_large - used
    assert (in_place, reclaimable) == (a._in_place, a._reclaimable), "what can be had"
    assert sorted(a._free) == [n for n, owner in enumerate(a._owner) if owner < 0], "free pages"
    assert sum(a.ledger().values()) == a.num_large * a.large_page, "ledger"
