"""What one sequence takes of the arena at every length, under each way of handing out memory.

`contiguous` reserves the longest sequence for each (before paging); `paged` is one page for all layers, which keep
every token; `max`, `static`, `lcm`, `near` are page plans for layers that cache different things. Tables are over
lengths 0 .. max_len, in bytes; they equal PagePlan.allocated_bytes length by length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmtool.core.memory.model import LayerType, ModelGeometry
from llmtool.core.memory.page_plan import Mode, PagePlan, Pool, plan_pages
from llmtool.errors import InfeasibleError, UsageError
from llmtool.memprofile.setting import Setting

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
KEEPERS = ("full", "mla", "draft")  # kinds of which a later token reads everything
ALLOCATORS = ("contiguous", "paged", "max", "static", "lcm", "near")
PLANS: Mapping[str, Mode] = {
    "paged": "uniform",
    "max": "max",
    "static": "static",
    "lcm": "lcm",
    "near": "near",
}


@dataclass(frozen=True, slots=True)
class Demand:
    """capacity: bytes of each partition of the arena, one but for `static`. table: partition x length, what a
    sequence takes. by_type: layer type x length, the same by layer type; live: what of it the next token reads.
    names: of the layer types. Of a cached prefix, by partition: share, bytes a token in layers that keep
    everything; window, bytes a token in those that keep the last window_tokens; state, bytes of a checkpoint.
    reusable: whether prefixes can be found again at all. plan: None for `contiguous`."""

    name: str
    capacity: Ints
    table: Ints
    by_type: Ints
    live: Ints
    names: tuple[str, ...]
    share: Floats
    window: Floats
    window_tokens: int
    state: Ints
    reusable: bool
    plan: PagePlan | None
    alive: float = 1.0  # part of `share` that every later token reads

    @property
    def arena(self) -> int:
        return int(self.capacity.sum())

    def fits(self, length: int) -> int:
        """Sequences of `length` tokens that fit at once."""
        return int((self.capacity // np.maximum(self.table[:, length], 1)).min())


def live_tokens(kind: LayerType, n: Ints, image: int) -> Ints:
    """LayerCacheSpec.live_tokens for many lengths at once; a state counts as none."""
    spec = kind.spec
    if kind.is_state:
        return np.zeros_like(n)
    if spec.kind == "cross_attention":
        return np.full_like(n, image)
    if spec.kind == "sliding_window" and spec.window is not None:
        return np.minimum(n, spec.window)
    if spec.kind == "chunked" and spec.chunk is not None:
        return np.where(n > 0, (n - 1) % spec.chunk + 1, 0)
    return n


def pages(kind: LayerType, n: Ints, image: int, size: int) -> Ints:
    """LayerType.pages for many lengths at once."""
    if kind.is_state:
        return np.ones_like(n)
    live = live_tokens(kind, n, image)
    end = np.full_like(n, image) if kind.spec.kind == "cross_attention" else n
    return np.where(live > 0, -(-end // size) - (end - live) // size, 0)


def demand(name: str, s: Setting, arena: int, expected: int) -> Demand:
    """expected: the length that `static` splits the arena for. Raises UsageError for an unknown name,
    InfeasibleError where the plan does not exist."""
    if name not in ALLOCATORS:
        raise UsageError(f"{name!r} is no allocator.", f"Choose from {', '.join(ALLOCATORS)}.")
    geometry = s.geometry
    types = geometry.types()
    n = np.arange(s.max_len + 1, dtype=np.int64)
    row = np.array([len(t.layers) * t.spec.bytes_per_token for t in types], dtype=np.int64)
    states = np.array([len(t.layers) * t.spec.state_bytes for t in types], dtype=np.int64)
    live = np.stack([live_tokens(t, n, s.image) * r + b for t, r, b in zip(types, row, states, strict=True)])
    names = tuple(t.name for t in types)
    kept = np.stack([_kept(t, n, s.image) * r + b for t, r, b in zip(types, row, states, strict=True)])
    if name == "contiguous":
        whole = np.repeat(kept[:, -1:], len(n), axis=1)
        nothing = np.zeros(1)
        return Demand(
            name, np.array([arena]), whole.sum(axis=0, keepdims=True), whole, live, names, nothing, nothing, 0,
            np.zeros(1, dtype=np.int64), False, None,
        )  # fmt: skip
    plan = plan_pages(geometry, s.page, mode=PLANS[name], expected_tokens=max(1, expected))
    if name == "paged":
        return _uniform(s, plan, arena, n, kept, live, names, states)
    taken = [len(p.groups) * pages(p.type, n, s.image, p.tokens_per_page) for p in plan.pools]
    # Bytes of the arena per byte that a small page holds, padding included.
    if name == "static":
        by_type = np.stack([t * p.stride for t, p in zip(taken, plan.pools, strict=True)])
        # A partition holds whole pages.
        capacity = np.array([int(arena * p.share) // p.stride * p.stride for p in plan.pools], dtype=np.int64)
        table, unit = by_type, [float(p.stride) for p in plan.pools]
    else:
        by_type = np.stack(
            [-(-t // p.per_large) * plan.large_page for t, p in zip(taken, plan.pools, strict=True)]
        )
        capacity = np.array([arena // plan.large_page * plan.large_page], dtype=np.int64)
        table, unit = by_type.sum(axis=0, keepdims=True), [plan.large_page / p.per_large for p in plan.pools]
    per_token = [
        0.0 if p.type.is_state else len(p.groups) * u / p.tokens_per_page
        for p, u in zip(plan.pools, unit, strict=True)
    ]
    reach = [(p.type.spec.window or p.type.spec.chunk or 0) if _reaches(p) else 0 for p in plan.pools]
    shortest = min((r for r in reach if r), default=0)
    share = np.array(
        [t if p.type.spec.kind in KEEPERS else 0.0 for t, p in zip(per_token, plan.pools, strict=True)]
    )
    window = np.array([t if r else 0.0 for t, r in zip(per_token, reach, strict=True)])
    held = np.array(
        [len(p.groups) * u if p.type.is_state else 0 for p, u in zip(plan.pools, unit, strict=True)]
    )
    alive = _always(geometry) / float(share.sum()) if share.any() else 1.0
    if name != "static":
        share, window, held = (np.array([x.sum()]) for x in (share, window, held))
    return Demand(
        name, capacity, table, by_type, live, names, share, window, shortest, held.astype(np.int64), True, plan,
        alive,
    )  # fmt: skip


def _always(geometry: ModelGeometry) -> int:
    """Bytes a token in layers that read everything."""
    kinds = [t for t in geometry.types() if t.spec.kind in KEEPERS]
    return sum(len(t.layers) * t.spec.bytes_per_token for t in kinds)


def _reaches(pool: Pool) -> bool:
    return pool.type.spec.kind in ("sliding_window", "chunked")


def _kept(kind: LayerType, n: Ints, image: int) -> Ints:
    """Tokens that a type keeps where all layers keep everything."""
    if kind.is_state:
        return np.zeros_like(n)
    return np.full_like(n, image) if kind.spec.kind == "cross_attention" else n


def _uniform(
    s: Setting,
    plan: PagePlan,
    arena: int,
    n: Ints,
    kept: Ints,
    live: Ints,
    names: tuple[str, ...],
    states: Ints,
) -> Demand:
    """One page for all attention layers, states beside it. A page's bytes are its layers', by what they keep."""
    pool, has_states = plan.pools[0], bool(states.any())
    if pool.type.is_state:
        by_type = np.repeat(states[:, None], len(n), axis=1)
        none = np.zeros(1)
        return Demand(
            "paged", np.array([arena]), by_type.sum(axis=0, keepdims=True), by_type, live, names, none, none, 0,
            np.zeros(1, dtype=np.int64), False, plan,
        )  # fmt: skip
    crossed = any(spec.kind == "cross_attention" for spec in pool.type.layers)
    count = -(-(n + (s.image if crossed else 0)) // pool.tokens_per_page)
    rows = [
        (0 if t.is_state else len(t.layers) * t.spec.bytes_per_token * pool.tokens_per_page)
        for t in s.geometry.types()
    ]
    by_type = np.stack([count * r + b for r, b in zip(rows, states, strict=True)])
    by_type[int(np.argmax(rows))] += count * (pool.stride - sum(rows))  # what the page is rounded up by
    table = by_type.sum(axis=0, keepdims=True)
    capacity = np.array([arena if has_states else arena // pool.stride * pool.stride], dtype=np.int64)
    share = np.array([pool.stride / pool.tokens_per_page])
    return Demand(
        "paged", capacity, table, by_type, live, names, share, np.zeros(1), 0, np.zeros(1, dtype=np.int64),
        not has_states, plan, _always(s.geometry) / float(share[0]),
    )  # fmt: skip


def demands(
    names: tuple[str, ...], s: Setting, arena: int, expected: int
) -> tuple[dict[str, Demand], dict[str, str]]:
    """Those that exist, and why the others do not."""
    found: dict[str, Demand] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            found[name] = demand(name, s, arena, expected)
        except InfeasibleError as error:
            refused[name] = error.message
    return found, refused
