"""The page plan on one rank: the scheduler's block tables name pages of a plan for all layers, and each rank's
pages hold the layers and heads that it has.

A page keeps its number everywhere; only its size differs. A table entry is an offset in the plan's arena, so a rank
turns it into the number of a large page and the place of a small one in it, and these into an offset in its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmtool.core.memory.geometry import UNIT, KVCacheGroup, LayerCacheSpec
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.tables import Pages
from llmtool.errors import InfeasibleError


@dataclass(frozen=True, slots=True)
class _Stride:
    """Units from one page to the next: large pages and small ones, in the plan and here."""

    large: int
    small: int
    local_large: int
    local_small: int


@dataclass(frozen=True, slots=True)
class LocalPages:
    """groups: what the rank's pages hold, layers by the rank's numbers; group i is number kept[i] of the plan.
    page_bytes: of a page of the plan, here."""

    groups: tuple[KVCacheGroup, ...]
    kept: tuple[int, ...]
    page_bytes: int
    _strides: tuple[_Stride, ...]

    def entries(self, i: int, entries: ArrayLike) -> NDArray[np.int64]:
        """Table entries of the rank's group i, as offsets in its own arena."""
        at, given = self._strides[i], np.asarray(entries, np.int64)
        large, rest = np.divmod(given, at.large)
        return large * at.local_large + rest // at.small * at.local_small


def local_pages(
    pages: KVCacheGroup | PagePlan, cached: Sequence[LayerCacheSpec], layers: range
) -> LocalPages:
    """What pages of the plan are on a rank. cached: what its layers cache, by its own numbers, which begin with
    layer layers.start of the model. Raises InfeasibleError where nothing is cached there."""
    held: dict[tuple[int, bool], LayerCacheSpec] = {
        (layers[spec.layer], spec.state_bytes > 0): spec for spec in cached
    }
    if not held:
        raise InfeasibleError(
            f"Layers {layers.start} to {layers.stop - 1} cache nothing, and make no stage of their own.",
            "Take fewer stages, or other layers for each.",
        )
    if isinstance(pages, KVCacheGroup):
        group = _local(pages, held)
        return LocalPages((group,), (0,), group.page_bytes, (_uniform(pages, group),))
    groups: list[KVCacheGroup] = []
    kept: list[int] = []
    pools: list[
        tuple[int, int, list[int]]
    ] = []  # per pool: its stride here, small pages of a large one, its groups
    number = 0
    for pool in pages.pools:
        mine = [_local(group, held) for group in pool.groups]
        stride = max((g.page_bytes for g in mine if g.layers), default=0)
        places = []
        for group in mine:
            if group.layers:
                places.append(len(groups))
                groups.append(replace(group, page_bytes=stride))
                kept.append(number)
            number += 1
        pools.append((stride, pool.per_large, places))
    large = max(stride * count for stride, count, _ in pools)
    strides: list[_Stride] = [_Stride(1, 1, 1, 1)] * len(groups)
    for pool, (stride, _, places) in zip(pages.pools, pools, strict=True):
        for place in places:
            strides[place] = _Stride(
                pages.large_page // UNIT, pool.stride // UNIT, large // UNIT, stride // UNIT
            )
    return LocalPages(tuple(groups), tuple(kept), large, tuple(strides))


def _uniform(whole: KVCacheGroup, local: KVCacheGroup) -> _Stride:
    return _Stride(whole.page_units, whole.page_units, local.page_units, local.page_units)


def _local(group: KVCacheGroup, held: dict[tuple[int, bool], LayerCacheSpec]) -> KVCacheGroup:
    """The group with the layers that are here, packed in order."""
    mine, offsets, at = [], [], 0
    for spec in group.layers:
        own = held.get((spec.layer, spec.state_bytes > 0))
        if own is not None:
            mine.append(own)
            offsets.append(at)
            at += own.bytes_for(group.tokens_per_page)
    return KVCacheGroup(
        group.name, tuple(mine), group.tokens_per_page, tuple(offsets), max(UNIT, -(-at // UNIT) * UNIT)
    )


class LocalSizes:
    """How many pages sequences need, as the plan says, and how large one is on this rank."""

    def __init__(self, whole: Pages, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._whole = whole

    def pages(self, num_tokens: int) -> int:
        return self._whole.pages(num_tokens)

    def least(self, sequences: int) -> int:
        return self._whole.least(sequences)
