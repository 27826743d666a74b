"""What a search found, as data: ranked plans, ties, the Pareto set, why others lose, counts. Sentences and
numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmtool.plan.objective import Objective
from llmtool.plan.search import Outcome, SearchResult
from llmtool.plan.tier import Tier
from llmtool.sim.deployment import Deployment


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Of simulated plans, those that no other beats in tokens/s per device, mean TPOT and mean TTFT at once."""

    def point(o: Outcome) -> tuple[float, float, float]:
        f = o.figures
        return -f["output_tokens_per_s_per_device"], f["mean_tpot_ms"], f["mean_ttft_ms"]

    front: list[Outcome] = []
    seen: set[tuple[float, float, float]] = set()
    for o in sorted(outcomes, key=point):
        p = point(o)
        beaten = any(all(a <= b for a, b in zip(point(x), p, strict=True)) for x in front)
        if not beaten and p not in seen:
            front.append(o)
            seen.add(p)
    return front


def distinct(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, list[Outcome]]]:
    """Plans with the same figures as one, the one with the smallest limits first: (shown, the others)."""
    groups: dict[Any, list[Outcome]] = {}
    for o in outcomes:
        d = o.deployment
        groups.setdefault((d.plan, d.dtype, d.kv_dtype, d.drafting, round(o.loss, 12)), []).append(o)
    out = []
    for group in groups.values():
        group.sort(key=lambda o: (o.deployment.budget, o.deployment.max_seqs))
        out.append((group[0], group[1:]))
    return out


def ties(outcomes: Sequence[Outcome], band: float) -> list[Outcome]:
    """Plans whose loss is within the error band of the best one's, the best left out."""
    if not outcomes:
        return []
    best = outcomes[0]
    return [o for o in outcomes[1:] if o.meets == best.meets and o.loss <= best.loss * (1 + band)]


def why_it_loses(loser: Outcome, winner: Outcome, objective: Objective) -> str:
    """One sentence: by how much, and what its steps spend their time on instead."""
    ratio = loser.loss / winner.loss if winner.loss else float("inf")
    a, b = loser.figures["time_share"], winner.figures["time_share"]
    worst = max(
        a, key=lambda name: a[name] * loser.figures["mean_tpot_ms"] - b[name] * winner.figures["mean_tpot_ms"]
    )
    text = f"{loser.deployment.plan}: {objective.describe(loser.loss)}, {ratio:.2f}x the winner's loss"
    if not loser.meets:
        text += "; it misses the objectives"
    if ratio > 1.005:
        text += (
            f"; {a[worst]:.0%} of its steps' time is bound by {worst} ({b[worst]:.0%} of the winner's), a token "
            f"takes {loser.figures['mean_tpot_ms']:.1f} ms ({winner.figures['mean_tpot_ms']:.1f} ms)"
        )
    if loser.figures["preemptions"] > winner.figures["preemptions"]:
        text += f"; KV memory runs short: {loser.figures['preemptions']} preemptions"
    return text + "."


def describe_plan(d: Deployment) -> dict[str, Any]:
    p = d.plan
    return {
        "plan": str(p),
        "tensor_parallel": p.tp,
        "pipeline_parallel": p.pp,
        "data_parallel": p.dp,
        "expert_parallel": p.ep,
        "attention_data_parallel": p.attention_dp,
        "layers": list(p.layers),
        "devices": p.devices,
        "max_num_batched_tokens": d.budget,
        "max_num_seqs": d.max_seqs,
        "weights": d.dtype,
        "kv_cache": d.kv_dtype,
        "speculation": d.drafting.spec if d.drafting else "off",
    }


def document(result: SearchResult, tier: Tier, heuristic: Deployment | None) -> dict[str, Any]:
    """Everything for --json."""
    simulated = result.simulated
    front = {id(o) for o in pareto(simulated)}
    tied = {id(o) for o in ties(simulated, tier.band)}
    plans = []
    for rank, o in enumerate(simulated, 1):
        plans.append(
            {
                "rank": rank,
                **describe_plan(o.deployment),
                "loss": o.loss,
                "objective": result.objective.describe(o.loss),
                "lower_bound": o.bound,
                "tie": id(o) in tied,
                "pareto": id(o) in front,
                **o.figures,
            }
        )
    rejected = [
        {"reason": r, "count": n, "example": result.space.examples[r]}
        for r, n in result.space.rejected.items()
    ]
    others = [o for o in result.outcomes if o.stage != "simulated"]
    out: dict[str, Any] = {
        "objective": result.objective.kind,
        "slos": [str(s) for s in result.objective.slos],
        "workload": {
            "name": result.workload.name,
            "requests": len(result.workload.rows),
            "mean_input_tokens": result.workload.mean_input,
            "mean_output_tokens": result.workload.mean_output,
            "request_rate": result.workload.rate,
            "max_concurrency": result.workload.concurrency,
        },
        "tier": tier.name,
        "error_band": tier.band,
        "source": tier.source,
        "counts": result.counts(),
        "plans": plans,
        "rejected": rejected,
        "not_simulated": [
            {**describe_plan(o.deployment), "stage": o.stage, "why_not": o.why_not} for o in others
        ],
    }
    if result.objective.price is not None:
        out["price"] = {
            "usd_per_hour": result.objective.price.usd_per_hour,
            "note": result.objective.price.note,
        }
    base = next((o for o in simulated if o.deployment == heuristic), None)
    if base is not None:
        out["heuristic"] = {
            **describe_plan(base.deployment),
            "speedup": base.loss / result.best.loss,
            "why": why_it_loses(base, result.best, result.objective),
        }
    return out
