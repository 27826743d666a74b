"""What one decoding request of a given length costs, layer type by layer type."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.core.memory.page_plan import PagePlan, plan_pages
from llmtool.memprofile.setting import Setting


@dataclass(frozen=True, slots=True)
class Item:
    """taken: bytes of the arena that nobody else gets; live: what of it the next token reads; outside: in pages,
    before a window or after the last token; padding: what no page reaches, and pages of the last large page that
    stay empty. live + outside + padding = taken."""

    type: str
    layers: int
    tables: int
    small_pages: int
    large_pages: int
    taken: int
    live: int
    outside: int
    padding: int


def bill(s: Setting, length: int) -> list[Item]:
    """Under the plan `near`."""
    return itemise(plan_pages(s.geometry, s.page, mode="near"), length, s.image)


def itemise(plan: PagePlan, length: int, image: int = 0) -> list[Item]:
    """For plans whose large pages serve all types. The items' bytes sum to plan.allocated_bytes."""
    items = []
    for pool in plan.pools:
        small = pool.small_pages(length, image)
        large = -(-small // pool.per_large)
        taken, live = large * plan.large_page, pool.type.live_bytes(length, image)
        per_table = small // len(pool.groups)
        held = sum(group.payload_bytes for group in pool.groups) * per_table
        items.append(
            Item(
                pool.type.name,
                len(pool.type.layers),
                len(pool.groups),
                small,
                large,
                taken,
                live,
                held - live,
                taken - held,
            )
        )
    return items
