"""What makes one plan better than another, and the figures of a simulated plan that a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtool.errors import UsageError
from llmtool.hardware.prices import Price
from llmtool.plan.bounds import Bounds
from llmtool.sim.deployment import Deployment
from llmtool.sim.simulate import IDLE_SHARE, SimResult
from llmtool.sim.stepcost import BOUNDS
from llmtool.sim.workload import Workload
from llmtool.workload.slo import SLO

OBJECTIVES = ("goodput", "latency", "throughput", "cost", "energy")


@dataclass(frozen=True, slots=True)
class Objective:
    """kind: goodput (requests/s within the SLOs), latency (mean end to end), throughput (output tokens/s per
    device), cost ($ per million output tokens), energy (J per million output tokens). Percentile SLOs are
    conditions."""

    kind: str
    slos: tuple[SLO, ...] = ()
    price: Price | None = None

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise UsageError(f"The objective {self.kind!r} is unknown.", f"Known: {', '.join(OBJECTIVES)}.")
        check_slos(self.slos)

    def loss(self, result: SimResult) -> float:
        """What is minimised: a plan half as good has twice the loss."""
        if self.kind == "goodput":
            return _inverse(result.goodput(self.slos))
        if self.kind == "latency":
            return result.statistic("e2el", None)
        if self.kind == "throughput":
            return _inverse(result.output_throughput / result.devices)
        tokens = sum(f.output_tokens for f in result.finished)
        if self.kind == "energy":
            return result.joules() / tokens * 1e6
        assert self.price is not None
        return dollars(self.price, result.devices, result.duration) / tokens * 1e6

    def least_loss(self, bounds: Bounds, deployment: Deployment, workload: Workload, power: float) -> float:
        """A lower bound of `loss`."""
        devices, n = deployment.plan.devices, len(workload.rows)
        tokens = sum(row.output_len for row in workload.rows)
        if self.kind == "goodput":
            return bounds.duration / n
        if self.kind == "latency":
            return float(bounds.e2e.mean()) * 1000
        if self.kind == "throughput":
            return bounds.duration * devices / tokens
        if self.kind == "energy":
            return IDLE_SHARE * power * devices * bounds.duration / tokens * 1e6
        assert self.price is not None
        return dollars(self.price, devices, bounds.duration) / tokens * 1e6

    def describe(self, loss: float) -> str:
        """A loss in the words of the objective."""
        if self.kind == "goodput":
            return f"{1 / loss:.3g} requests/s"
        if self.kind == "latency":
            return f"{loss / 1000:.3g} s"
        if self.kind == "throughput":
            return f"{1 / loss:.4g} output tokens/s per device"
        return f"{loss:.4g} {'$' if self.kind == 'cost' else 'J'} per million output tokens"


def _inverse(value: float) -> float:
    return 1.0 / value if value > 0 else float("inf")


def dollars(price: Price, devices: int, seconds: float) -> float:
    return price.usd_per_hour * devices * seconds / 3600


def check_slos(slos: Sequence[SLO]) -> None:
    """Raises UsageError where two SLOs contradict each other or a simulation cannot judge one."""
    for slo in slos:
        if slo.metric == "itl":
            raise UsageError(f"A simulated plan has no {slo}.", "Bound tpot, a request's mean gap.")
    by = {(s.metric, s.percentile): s.limit_ms for s in slos}
    for (metric, p), limit in by.items():
        if p is None:
            continue
        for (other, q), above in by.items():
            if other == metric and q is not None and q > p and above < limit:
                raise UsageError(
                    f"{metric}:p{q:g}:{above:g} is stricter than {metric}:p{p:g}:{limit:g} at a higher percentile: "
                    "the second then asks for nothing.",
                    "Give the higher percentile the larger limit.",
                )
    for p in {s.percentile for s in slos}:
        e2e = by.get(("e2el", p))
        ttft = by.get(("ttft", p))
        if e2e is not None and ttft is not None and ttft > e2e:
            raise UsageError(
                f"The limits contradict each other: {ttft:g} ms to the first token, but {e2e:g} ms to the last.",
                "Raise the e2el limit or lower ttft's.",
            )


def time_share(result: SimResult) -> dict[str, float]:
    """Parts of the steps' time by what bounds it."""
    work = result.work
    return {name: getattr(work, name) / work.seconds if work.seconds else 0.0 for name in BOUNDS}


def figures(result: SimResult, objective: Objective) -> dict[str, Any]:
    """A simulated plan's numbers, for tables and JSON. Times in milliseconds."""
    tokens = sum(f.output_tokens for f in result.finished)
    mfu, mbu = result.utilization()
    per_request = [s for s in objective.slos if s.percentile is None]
    out: dict[str, Any] = {
        "output_tokens_per_s_per_device": result.output_throughput / result.devices,
        "output_throughput": result.output_throughput,
        "request_throughput": result.request_throughput,
        "request_goodput": result.goodput(objective.slos) if per_request else None,
        "meets_slos": result.meets(objective.slos),
        "joules_per_million_tokens": result.joules() / tokens * 1e6,
        "usd_per_million_tokens": None,
        "mfu": mfu,
        "mbu": mbu,
        "bound": result.bound,
        "time_share": time_share(result),
        "preemptions": result.preemptions,
        "kv_peak": result.kv_peak,
        "duration_s": result.duration,
    }
    if objective.price is not None:
        out["usd_per_million_tokens"] = (
            dollars(objective.price, result.devices, result.duration) / tokens * 1e6
        )
    for metric in ("ttft", "tpot", "e2el"):
        out[f"mean_{metric}_ms"] = result.statistic(metric, None)
        for p in (50, 90, 99):
            out[f"p{p}_{metric}_ms"] = result.statistic(metric, p)
    return out
