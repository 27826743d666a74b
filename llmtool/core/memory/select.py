"""Which allocator a model's KV memory gets."""

from __future__ import annotations

from typing import cast

from llmtool.core.memory.allocator import KVAllocator
from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.memory.model import ModelGeometry
from llmtool.core.memory.page_plan import Mode, PagePlan, plan_pages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.errors import UsageError


def plan_of(geometry: ModelGeometry, tokens_per_page: int, mode: str) -> PagePlan | None:
    """The page plan of a model that runs; None: uniform pages, which suit one that keeps all tokens in all layers.
    Raises UsageError for uniform pages of a model with states, and what `plan_pages` raises."""
    types = geometry.types()
    if all(kind.spec.kind in ("full", "mla") for kind in types):
        return None
    if mode == "uniform":
        if any(kind.is_state for kind in types):
            raise UsageError(
                f"Uniform pages cannot hold the states of {geometry.name}.", "Leave the page plan at near."
            )
        return None
    return plan_pages(geometry, tokens_per_page, mode=cast(Mode, mode))  # which checks it


def make_allocator(
    pages: KVCacheGroup | PagePlan,
    num_pages: int,
    host_pages: int = 0,
    prefix_caching: bool = True,
    step_tokens: int = 2048,
) -> KVAllocator:
    """Over `num_pages` pages of a group, or large pages of a plan. step_tokens: the most that a step computes of
    one sequence."""
    if isinstance(pages, KVCacheGroup):
        return UniformAllocator(pages, num_pages, host_pages, prefix_caching)
    return TwoLevelAllocator(pages, num_pages, host_pages, prefix_caching, step_tokens)
