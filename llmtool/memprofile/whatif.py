"""What another setting would bring: the same requests again, one thing changed, by how many run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmtool.errors import InfeasibleError, UsageError
from llmtool.memprofile.demand import demand
from llmtool.memprofile.ledger import card_ledger
from llmtool.memprofile.replay import Replay, replay
from llmtool.memprofile.requests import Ask
from llmtool.memprofile.setting import Setting

WORTH = 1.005  # of the batch, or of the hit rate


@dataclass(frozen=True, slots=True)
class WhatIf:
    """gain: mean batch, relative to now; hits: hit rate then. devices: how many of today's cards it takes."""

    change: str
    mean_batch: float
    gain: float
    hits: float
    devices: int


def candidates(s: Setting) -> list[tuple[str, Setting]]:
    """Changes that cost no quality that is not said, and that this model can have."""
    found: list[tuple[str, Setting]] = []

    def add(text: str, **changes: object) -> None:
        try:
            found.append((text, replace(s, **changes)))  # type: ignore[arg-type]
        except UsageError:  # heads that do not divide
            return

    if s.kv_dtype == "bf16":
        add("--kv-dtype fp8", kv_dtype="fp8")
    if s.dtype == "bf16":
        add("--dtype fp8 (weights)", dtype="fp8")
    if s.arena is None:
        add(f"--tensor-parallel-size {2 * s.tp}", tp=2 * s.tp)
        if s.utilization < 0.95:
            add("--gpu-memory-utilization 0.95", utilization=0.95)
        if s.budget > 2048:
            add("--max-num-batched-tokens 2048", budget=2048)
    if s.page > 8:
        add(f"--block-size {s.page // 2}", page=s.page // 2)
    if any(t.is_state for t in s.geometry.types()):
        add(f"--checkpoint-every {4 * s.checkpoint}", checkpoint=4 * s.checkpoint)
    add(f"--max-num-seqs {2 * s.max_seqs}", max_seqs=2 * s.max_seqs)
    return found


def what_ifs(s: Setting, asks: Sequence[Ask], now: Replay, expected: int, best: int = 3) -> list[WhatIf]:
    """The best changes, by mean batch, then by hit rate."""
    rows = []
    for text, then in candidates(s):
        try:
            arena = card_ledger(then).arena
            r = replay(demand("near", then, arena, expected), asks, then.max_seqs, then.page)
        except InfeasibleError:
            continue
        gain = r.mean / now.mean if now.mean else 0.0
        if r.never <= now.never and (
            gain > WORTH or (gain > 0.999 and r.hit_rate > WORTH * now.hit_rate > 0)
        ):
            rows.append(WhatIf(text, r.mean, gain, r.hit_rate, then.tp // s.tp))
    rows.sort(key=lambda w: (-w.gain / w.devices, -w.hits))
    return rows[:best]
