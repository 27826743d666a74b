"""The whole answer as one document: what --json prints, and what the tables and the HTML file are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from llmtool.core.memory.page_plan import plan_pages
from llmtool.errors import InfeasibleError
from llmtool.memprofile.bill import bill
from llmtool.memprofile.demand import Demand, demands
from llmtool.memprofile.ledger import CardLedger, card_ledger, size
from llmtool.memprofile.replay import Moment, Replay, replay
from llmtool.memprofile.requests import Ask
from llmtool.memprofile.setting import Setting
from llmtool.memprofile.whatif import what_ifs

CONTEXTS = (1024, 4096, 8192, 32768, 131072)
POINTS = 60  # of the timeline


def fit(asks: Sequence[Ask], max_len: int) -> tuple[list[Ask], int]:
    """Requests of at most max_len tokens, and how many were longer. What waits for one left out comes at once."""
    kept, at = list[Ask](), dict[int, int]()
    for i, ask in enumerate(asks):
        if ask.length <= max_len:
            at[i] = len(kept)
            kept.append(replace(ask, after=at.get(ask.after) if ask.after is not None else None))
    return kept, len(asks) - len(kept)


def profile(
    s: Setting, asks: Sequence[Ask], workload: str, compare: tuple[str, ...], explain: int | None = None
) -> dict[str, Any]:
    """Raises InfeasibleError when the model does not fit, or no request does."""
    ledger = card_ledger(s)
    asks, longer = fit(asks, s.max_len)
    if not asks:
        raise InfeasibleError(
            f"All {longer} requests are longer than {s.max_len} tokens.", "Raise --max-model-len."
        )
    expected = sum(a.prompt + a.output // 2 for a in asks) // len(asks)
    names = tuple(dict.fromkeys((*compare, "near")))
    found, refused = demands(names, s, ledger.arena, expected)
    if "near" not in found:
        raise InfeasibleError(
            refused["near"], "Raise --memory, or take fewer tokens per page with --block-size."
        )
    runs = {name: replay(d, asks, s.max_seqs, s.page) for name, d in found.items()}
    near = runs["near"]
    longest = max(a.length for a in asks)
    if near.never:
        need = int(found["near"].table[:, longest].sum())
        raise InfeasibleError(
            f"A request of {longest} tokens needs {size(need)} of KV, and {size(ledger.arena)} are left for it: "
            f"{near.never} of {len(asks)} requests could never run.",
            "Take a larger card, --tensor-parallel-size, --kv-dtype fp8 or a smaller --max-model-len.",
        )
    bound = binding(near, found["near"], s)
    return {
        "model": s.ir.name,
        "card_bytes": s.card,
        "devices": s.tp,
        "settings": {k: v for k, v in asdict(s).items() if k != "ir"},
        "ledger": _parts(ledger, found["near"], near),
        "workload": {
            "name": workload,
            "requests": len(asks),
            "left_out_too_long": longer,
            "mean_prompt": sum(a.prompt for a in asks) / len(asks),
            "mean_output": sum(a.output for a in asks) / len(asks),
            "longest": longest,
        },
        "allocators": [_row(name, runs, found, refused, expected) for name in names if name in compare],
        "binding": bound,
        "what_ifs": [asdict(w) for w in what_ifs(s, asks, near, expected)],
        "contexts": [
            {"tokens": n, "sequences": {name: d.fits(n) for name, d in found.items()}}
            for n in CONTEXTS
            if n <= s.max_len
        ],
        "explain": _explain(s, explain, found) if explain is not None else None,
        "plan": plan_pages(s.geometry, s.page, mode="near").explain().splitlines(),
        "timeline": timeline(near, found["near"]),
        "simulated": True,
    }


def _row(
    name: str,
    runs: Mapping[str, Replay],
    found: Mapping[str, Demand],
    refused: Mapping[str, str],
    expected: int,
) -> dict[str, Any]:
    if name in refused:
        return {"allocator": name, "refused": refused[name]}
    r = runs[name]
    return {
        "allocator": name,
        "fit_at_mean_length": found[name].fits(expected),
        "p50_batch": r.p50,
        "p95_batch": r.p95,
        "mean_batch": r.mean,
        "peak_batch": r.peak,
        "preemptions": r.preemptions,
        "hit_rate": r.hit_rate,
        "live_share": r.live_share,
        "steps": r.steps,
        "never_fit": r.never,
        "memory_limits": r.saturated,
    }


def split(moment: Moment, demand: Demand) -> dict[str, int]:
    """The arena at a moment, in whole bytes that sum to it: what each layer type's next step reads, what of the
    pages is not read, cached prefixes, free. What several requests share is counted once."""
    live, taken = moment.live.astype(object), moment.taken.astype(object)
    shared = moment.shared
    biggest = max(range(len(live)), key=lambda i: live[i])
    parts: dict[str, int] = {}
    for i, name in enumerate(demand.names):
        once = shared if i == biggest else 0
        parts[f"KV: {name}"] = int(max(0, live[i] - once))
    idle = int(sum(taken) - sum(live))
    parts["KV: page tails, padding"] = max(0, idle)
    parts["KV: cached prefixes"] = moment.cached
    used = sum(parts.values())
    if used > demand.arena:  # rounding of shared bytes
        parts["KV: cached prefixes"] = max(0, moment.cached - (used - demand.arena))
        used = sum(parts.values())
    parts["KV: free"] = demand.arena - used
    return parts


def _parts(ledger: CardLedger, demand: Demand, near: Replay) -> list[dict[str, Any]]:
    rows = [{"part": p.name, "bytes": p.bytes, "note": p.note} for p in ledger.parts if p.name != "kept back"]
    moment = near.typical
    assert moment is not None
    for name, count in split(moment, demand).items():
        rows.append(
            {"part": name, "bytes": count, "note": f"{moment.batch} sequences" if "free" in name else ""}
        )
    rows.append(
        {
            "part": "KV: less than a large page",
            "bytes": ledger.arena - demand.arena,
            "note": "at the arena's end",
        }
    )
    rows += [
        {"part": p.name, "bytes": p.bytes, "note": p.note} for p in ledger.parts if p.name == "kept back"
    ]
    assert sum(int(r["bytes"]) for r in rows) == ledger.card, "the ledger sums to the card"  # type: ignore[call-overload]
    return [r for r in rows if r["bytes"]]


def binding(near: Replay, demand: Demand, s: Setting) -> dict[str, Any]:
    """The layer type that takes most of what running sequences take, over all steps; or the limit of sequences."""
    total = np.sum([m.steps * m.taken for m in near.moments], axis=0)
    which = int(total.argmax())
    share = float(total[which] / total.sum())
    limit = "memory"
    if near.p50 >= s.max_seqs:
        limit = "max_num_seqs"
    elif not near.saturated:
        limit = "nothing"
    return {"limit": limit, "layer_type": demand.names[which], "share_of_taken": share}


def _explain(s: Setting, length: int, found: Mapping[str, Demand]) -> dict[str, Any]:
    if not 1 <= length <= s.max_len:
        from llmtool.errors import UsageError

        raise UsageError(
            f"--explain {length} is not between 1 and the longest sequence, {s.max_len}.",
            "Give another length, or set --max-model-len.",
        )
    items = bill(s, length)
    return {
        "tokens": length,
        "items": [asdict(item) for item in items],
        "taken": sum(i.taken for i in items),
        "live": sum(i.live for i in items),
        "by_allocator": {name: int(d.table[:, length].sum()) for name, d in found.items()},
    }


def timeline(near: Replay, demand: Demand) -> list[dict[str, Any]]:
    """At most POINTS moments, evenly over the steps."""
    ends, at = [], 0
    for m in near.moments:
        at += m.steps
        ends.append(at)
    if not ends:
        return []
    rows, i = [], 0
    count = min(POINTS, ends[-1])
    for k in range(count):
        step = int((k + 0.5) * ends[-1] / count)
        while ends[i] <= step:
            i += 1
        rows.append({"step": step, "batch": near.moments[i].batch, "bytes": split(near.moments[i], demand)})
    return rows
