"""Page plans: how large and small pages of one arena hold every layer type of a model.

Modes. `uniform`: one page holds all layers, every layer keeps every token (PagedAttention, section 4.2); states
lie beside it, exactly. `max`, `static`, `lcm`: what Jenga is compared with and Jenga itself. `near`:
a bounded large page that holds k small pages of each type at a stride of a k-th of it; table entries are offsets,
so nothing needs to divide anything. Waste is counted while decoding, with nothing cached for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Literal

from llmtool.core.memory.geometry import UNIT, KVCacheGroup
from llmtool.core.memory.model import LayerType, ModelGeometry
from llmtool.errors import InfeasibleError, UsageError

Mode = Literal["uniform", "max", "static", "lcm", "near"]
MODES: tuple[Mode, ...] = ("uniform", "max", "static", "lcm", "near")
MAX_PAGE = 16 << 20
LCM_LIMIT = 64 << 20
MAX_GROUPS = 28  # block tables per sequence that `near` may ask for
MAX_STATE_GROUPS = 64  # and tables of states, which have one entry and which no step appends to


@dataclass(frozen=True, slots=True)
class Pool:
    """Small pages of one layer type. groups: block tables over equal pages, each for a part of the type's layers.
    per_large: small pages in a large page. share: part of the arena set aside for this type (`static`), else 0."""

    type: LayerType
    groups: tuple[KVCacheGroup, ...]
    per_large: int
    share: float = 0.0

    @property
    def stride(self) -> int:
        """Bytes from one small page to the next."""
        return self.groups[0].page_bytes

    @property
    def tokens_per_page(self) -> int:
        return self.groups[0].tokens_per_page

    def small_pages(self, text: int, image: int = 0) -> int:
        return len(self.groups) * self.type.pages(text, image, self.tokens_per_page)


@dataclass(frozen=True, slots=True)
class PagePlan:
    """large_page: bytes. pools: one per layer type (`uniform` has one for all attention layers together)."""

    mode: Mode
    geometry: ModelGeometry
    large_page: int
    pools: tuple[Pool, ...]

    @property
    def groups(self) -> tuple[KVCacheGroup, ...]:
        return tuple(group for pool in self.pools for group in pool.groups)

    def allocated_bytes(self, text: int, image: int = 0) -> int:
        """Bytes of the arena that one decoding request keeps from others."""
        if self.mode == "uniform":
            return self._uniform_bytes(text, image)
        if self.mode == "static":
            # The partition that runs out first decides how many requests fit: the others' spare room is lost.
            return round(max(p.small_pages(text, image) * p.stride / p.share for p in self.pools if p.share))
        large = sum(-(-p.small_pages(text, image) // p.per_large) for p in self.pools)
        return large * self.large_page

    def _uniform_bytes(self, text: int, image: int) -> int:
        states = sum(kind.live_bytes(text) for kind in self.geometry.types() if kind.is_state)
        if len(self.pools) == 1 and self.pools[0].type.is_state:
            return states
        pool = self.pools[0]
        tokens = text + (image if any(s.kind == "cross_attention" for s in pool.type.layers) else 0)
        return states + -(-tokens // pool.tokens_per_page) * pool.stride

    def waste(self, text: int, image: int = 0) -> float:
        """Part of the allocated bytes that decoding at this length does not read, 0 to 1."""
        allocated = self.allocated_bytes(text, image)
        return 1 - self.geometry.live_bytes(text, image) / allocated if allocated else 0.0

    def explain(self) -> str:
        """One line for the large page, one per layer type."""
        lines = [f"{self.mode}: large pages of {_size(self.large_page)} for {self.geometry.name}"]
        for pool in self.pools:
            group, lost = pool.groups[0], self.large_page - pool.per_large * pool.groups[0].payload_bytes
            tables = "1 table" if len(pool.groups) == 1 else f"{len(pool.groups)} tables"
            holds = (
                "one state" if pool.type.is_state else f"{group.tokens_per_page} tokens"
            ) + f" of {len(group.layers)} layers"
            lines.append(
                f"  {pool.type.name}: {len(pool.type.layers)} layers in {tables}; a small page of "
                f"{_size(pool.stride)} holds {holds}; {pool.per_large} to a large page, "
                f"{lost / self.large_page:.2%} of it padding"
            )
        return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"


def _groups(kind: LayerType, parts: int, tokens: int, page_bytes: int = 0) -> tuple[KVCacheGroup, ...]:
    """The type's layers in `parts` tables with pages of equal size. page_bytes: their stride, if not the least."""
    most = -(-len(kind.layers) // parts)
    per_layer = kind.spec.bytes_for(tokens)
    stride = page_bytes or -(-most * per_layer // UNIT) * UNIT
    groups = []
    for part in range(parts):
        layers = kind.layers[part * most : (part + 1) * most]
        name = kind.name if parts == 1 else f"{kind.name}.{part}"
        offsets = tuple(range(0, len(layers) * per_layer, per_layer))
        groups.append(KVCacheGroup(name, layers, tokens, offsets, stride))
    return tuple(groups)


@lru_cache(maxsize=256)
def plan_pages(
    geometry: ModelGeometry,
    tokens_per_page: int = 16,
    max_page: int = MAX_PAGE,
    mode: Mode = "near",
    expected_tokens: int = 8192,
) -> PagePlan:
    """The page plan of a model; the same arguments give the same object. max_page: bound of `near`'s large page,
    bytes. expected_tokens: the length that `static` splits the arena for.

    Raises UsageError for arguments that make no sense, InfeasibleError when `lcm` needs pages above LCM_LIMIT or
    when `near` finds no large page within max_page.
    """
    if mode not in MODES:
        raise UsageError(f"{mode!r} is no page plan.", f"Choose one of {', '.join(MODES)}.")
    if tokens_per_page < 1 or expected_tokens < 1:
        raise UsageError(
            f"Pages of {tokens_per_page} tokens, expected length {expected_tokens}: both must be 1 or more."
        )
    if mode == "near":
        from llmtool.core.memory.near import near_plan  # it makes PagePlans, and so imports this module

        return near_plan(geometry, tokens_per_page, max_page)
    types = geometry.types()
    if mode == "uniform":
        return _uniform(geometry, types, tokens_per_page)
    if mode == "max":
        return _max(geometry, types, tokens_per_page)
    packed = [_groups(kind, 1, tokens_per_page) for kind in types]
    if mode == "static":
        # All of a type's pages are alike and no large page is shared: a large page is a small one.
        need = [
            kind.pages(expected_tokens, expected_tokens, tokens_per_page) * groups[0].page_bytes
            for kind, groups in zip(types, packed, strict=True)
        ]
        pools = tuple(
            Pool(kind, groups, 1, n / sum(need)) for kind, groups, n in zip(types, packed, need, strict=True)
        )
        return PagePlan("static", geometry, max(p.stride for p in pools), pools)
    return _lcm(geometry, types, packed)


def _uniform(geometry: ModelGeometry, types: tuple[LayerType, ...], tokens: int) -> PagePlan:
    attention = tuple(spec for kind in types if not kind.is_state for spec in kind.layers)
    if not attention:
        groups = _groups(types[0], 1, tokens)
        return PagePlan("uniform", geometry, groups[0].page_bytes, (Pool(types[0], groups, 1),))
    offsets, at = [], 0
    for spec in attention:
        offsets.append(at)
        at += spec.bytes_for(tokens)
    group = KVCacheGroup("full", attention, tokens, tuple(offsets), -(-at // UNIT) * UNIT)
    pool = Pool(LayerType("full", attention), (group,), 1)
    return PagePlan("uniform", geometry, group.page_bytes, (pool,))


def _max(geometry: ModelGeometry, types: tuple[LayerType, ...], tokens: int) -> PagePlan:
    """Every type's page as large as the largest; the others take as many tokens as it holds."""
    page = max(_groups(kind, 1, tokens)[0].page_bytes for kind in types)
    pools = []
    for kind in types:
        each = sum(spec.bytes_per_token for spec in kind.layers)
        held = tokens if kind.is_state else page // each // tokens * tokens
        pools.append(Pool(kind, _groups(kind, 1, held, page), 1))
    return PagePlan("max", geometry, page, tuple(pools))


def _lcm(
    geometry: ModelGeometry, types: tuple[LayerType, ...], packed: list[tuple[KVCacheGroup, ...]]
) -> PagePlan:
    """Jenga: the large page is the least common multiple of all small pages."""
    large = lcm(*(groups[0].page_bytes for groups in packed))
    if large > LCM_LIMIT:
        parts = ", ".join(f"{g[0].name} {_size(g[0].page_bytes)}" for g in packed)
        raise InfeasibleError(
            f"The least common multiple of the small pages of {geometry.name} ({parts}) is {_size(large)}, above "
            f"the limit of {_size(LCM_LIMIT)}: a short request would waste most of its pages.",
            "Use the plan 'near', whose large page is bounded.",
        )
    pools = tuple(
        Pool(kind, groups, large // groups[0].page_bytes) for kind, groups in zip(types, packed, strict=True)
    )
    return PagePlan("lcm", geometry, large, pools)
