"""What the engine counts: gauges of now, totals since the start. A snapshot is cheap to copy across processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtool.core.memory.allocator import KVAllocator


@dataclass(slots=True)
class SpecCounters:
    """Totals since the start. drafts: of one sequence in one step. accepted_at: by position in the draft. explain:
    the controller's last choice and what it rests on."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: tuple[int, ...] = ()
    watchdog_trips: int = 0
    explain: dict[str, Any] | None = None


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
    spec: SpecCounters | None = None  # of speculation, where there is any

    @property
    def kv_usage(self) -> float:
        """Part of the pages in use, 0 to 1; cached ones count as free."""
        return self.pages_used / self.pages_total if self.pages_total else 0.0


GAUGES = (
    "num_running",
    "num_waiting",
    "pages_total",
    "pages_used",
    "pages_cached",
    "pages_peak",
    "rss_bytes",
)


def total(parts: Iterable[EngineStats]) -> EngineStats:
    """Of several engines together. pages_peak is the sum of theirs, which need not have come at one moment; what a
    controller explains is the first one's."""
    out = EngineStats()
    for part in parts:
        for f in fields(EngineStats):
            if f.name not in ("finished", "spec"):
                setattr(out, f.name, getattr(out, f.name) + getattr(part, f.name))
        for reason, count in part.finished.items():
            out.finished[reason] = out.finished.get(reason, 0) + count
        if part.spec is not None:
            out.spec = part.spec if out.spec is None else _spec_total(out.spec, part.spec)
    return out


def _spec_total(a: SpecCounters, b: SpecCounters) -> SpecCounters:
    places = max(len(a.accepted_at), len(b.accepted_at))
    counts = [[*c.accepted_at, *[0] * (places - len(c.accepted_at))] for c in (a, b)]
    return SpecCounters(
        a.drafts + b.drafts,
        a.draft_tokens + b.draft_tokens,
        a.accepted_tokens + b.accepted_tokens,
        tuple(x + y for x, y in zip(*counts, strict=True)),
        a.watchdog_trips + b.watchdog_trips,
        a.explain or b.explain,
    )


def past(stats: EngineStats) -> EngineStats:
    """What stays of an engine that is gone: its totals, since the start of whatever has it."""
    gone = replace(stats)
    for gauge in GAUGES:
        setattr(gone, gauge, 0)
    return gone


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One engine of a fleet. role: both | prefill | decode. state: starting | up | down | dead; a dead one is not
    started again. pid: 0 while there is no process. load: unfinished requests. restarts: since the fleet's start.
    stats: totals over all its processes, gauges of the one that runs."""

    number: int
    role: str
    state: str
    pid: int
    load: int
    restarts: int
    stats: EngineStats


@dataclass(slots=True)
class Transfers:
    """KV sent from prefill to decode engines. failed: requests whose KV was computed again instead. seconds: in
    sum, from asking for one to its arrival, or failure."""

    done: int = 0
    failed: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class FleetView:
    """Engines behind one front end. retried: requests moved to another engine when theirs died. lost: those that
    failed by it, having given tokens already, or retried often enough. transfers: where prompts have engines of
    their own."""

    replicas: tuple[ReplicaView, ...]
    retried: int = 0
    lost: int = 0
    transfers: Transfers | None = None

    @property
    def up(self) -> int:
        return sum(r.state == "up" for r in self.replicas)


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


def memory_total(views: Iterable[MemoryView]) -> MemoryView:
    """Of several arenas together: bytes are summed, groups are the first one's."""
    arena, parts, groups = 0, dict[str, int](), tuple[GroupView, ...]()
    for view in views:
        arena += view.arena
        for name, nbytes in view.parts.items():
            parts[name] = parts.get(name, 0) + nbytes
        groups = groups or view.groups
    return MemoryView(arena, parts, groups)


def memory_view(allocator: KVAllocator) -> MemoryView:
    ledger = asdict(allocator.ledger())
    parts = {name: n for name, n in ledger.items() if name != "arena" and not name.startswith("pages_")}
    groups = tuple(
        GroupView(g.name, len(g.layers), g.tokens_per_page, g.page_bytes, g.bytes_per_token)
        for g in allocator.groups
    )
    return MemoryView(ledger["arena"], parts, groups)
