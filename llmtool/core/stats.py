"""What the engine counts: gauges of now, totals since the start. A snapshot is cheap to copy across processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtool.core.memory.allocator import KVAllocator


@dataclass(slots=True)
class EngineStats:
    """Tokens, pages and sequences; `prefix_*` are tokens looked up and found. steps: committed steps.

    rss_bytes: memory of the engine's process, filled in by whoever runs one.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_peak: int = 0  # most in use at once
    rss_bytes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    swapped_pages: int = 0
    copied_pages: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish reason

    @property
    def kv_usage(self) -> float:
        """Part of the pages in use, 0 to 1; cached ones count as free."""
        return self.pages_used / self.pages_total if self.pages_total else 0.0


@dataclass(frozen=True, slots=True)
class GroupView:
    """Layers that share block tables, and their pages; bytes."""

    name: str
    layers: int
    tokens_per_page: int
    page_bytes: int
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class MemoryView:
    """The KV arena's ledger at a moment, for other processes: bytes by what they hold, which sum to `arena`."""

    arena: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    groups: tuple[GroupView, ...] = ()


def memory_view(allocator: KVAllocator) -> MemoryView:
    ledger = asdict(allocator.ledger())
    parts = {name: n for name, n in ledger.items() if name != "arena" and not name.startswith("pages_")}
    groups = tuple(
        GroupView(g.name, len(g.layers), g.tokens_per_page, g.page_bytes, g.bytes_per_token)
        for g in allocator.groups
    )
    return MemoryView(ledger["arena"], parts, groups)
