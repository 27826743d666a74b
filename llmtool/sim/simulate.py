"""A whole deployment under a workload: engines behind a router, each the real scheduler on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from llmtool.core.routing import make_router
from llmtool.hardware import Cluster
from llmtool.sim.deployment import Deployment
from llmtool.sim.memory import DeviceMemory, device_memory
from llmtool.sim.ops import Ops
from llmtool.sim.replica import Finished, Replica, StepTotals
from llmtool.sim.stepcost import Batch, Breakdown, PlanCost
from llmtool.sim.workload import Workload, sim_request
from llmtool.workload.metrics import RequestRecord, judge, latencies_ms
from llmtool.workload.slo import SLO
from llmtool.workload.traces import TraceRow

IDLE_SHARE = 0.3  # of a device's power when it does nothing; the rest follows what it is used for


@dataclass
class SimResult:
    """finished: all requests, by id. duration: from the first arrival to the last end. totals: of each simulated
    attention group. devices: of the whole deployment. routes: of an open
    loop, the engine that each request went to."""

    deployment: Deployment
    cost: PlanCost
    memory: DeviceMemory
    finished: list[Finished]
    duration: float
    totals: list[StepTotals]
    devices: int
    preemptions: int = 0
    kv_peak: float = 0.0
    extra_devices: int = 0
    notes: tuple[str, ...] = field(default=())
    routes: tuple[int, ...] = ()

    @cached_property
    def records(self) -> list[RequestRecord]:
        """As bench records a request, seen by a client: what the frontend takes is on top."""
        front = self.deployment.engine.request
        return [
            RequestRecord(
                index=i,
                start=f.arrival,
                ttft=f.first_token - f.arrival + front,
                e2e=f.finished - f.arrival + front,
                prompt_tokens=f.prompt_tokens,
                output_tokens=f.output_tokens,
                max_tokens=f.output_tokens,
                success=True,
                cached_tokens=f.cached_tokens,
                counted=True,
            )
            for i, f in enumerate(self.finished)
        ]

    @cached_property
    def latencies(self) -> Mapping[str, Any]:
        """Milliseconds of ttft, tpot and e2el over requests."""
        return {k: np.asarray(v) for k, v in latencies_ms(self.records).items()}

    def statistic(self, metric: str, percentile: float | None) -> float:
        """Mean (None) or percentile in milliseconds; 0 where nothing was measured."""
        x = self.latencies[metric]
        if not len(x):
            return 0.0
        return float(np.mean(x) if percentile is None else np.percentile(x, percentile))

    def meets(self, slos: Sequence[SLO]) -> bool:
        """Every percentile SLO is met; per-request ones ask for nothing here, they count in goodput."""
        values = latencies_ms(self.records)
        return all(judge(s, self.records, values)["met"] for s in slos if s.percentile is not None)

    def goodput(self, slos: Sequence[SLO]) -> float:
        """Requests per second within every per-request SLO (slo_goodput)."""
        per_request = [s for s in slos if s.percentile is None]
        return sum(r.meets(per_request) for r in self.records) / self.duration if self.duration else 0.0

    @property
    def request_throughput(self) -> float:
        return len(self.finished) / self.duration if self.duration else 0.0

    @property
    def output_throughput(self) -> float:
        return sum(f.output_tokens for f in self.finished) / self.duration if self.duration else 0.0

    @property
    def total_throughput(self) -> float:
        tokens = sum(f.output_tokens + f.prompt_tokens for f in self.finished)
        return tokens / self.duration if self.duration else 0.0

    @cached_property
    def work(self) -> Breakdown:
        """Seconds by what bounds them, flops and bytes per device, over all steps of all groups: the mean decode
        step and the mean prompt step, times how many there were."""
        total = Breakdown()
        for t in self.totals:
            plain = t.steps - t.prompt_steps
            n = t.decodes / max(1, t.steps)
            context = t.decode_context / max(1, t.decodes)
            for count, prompt in ((plain, 0.0), (t.prompt_steps, t.prompt_tokens / max(1, t.prompt_steps))):
                if not count or (not prompt and not n):
                    continue
                batch = Batch(round(n), round(round(n) * context), samples=max(1, round(n)))
                if prompt:
                    mean = t.prompt_pairs / t.prompt_tokens  # keys per query
                    chunk = max(1, round(prompt))
                    batch.chunks.append((chunk, max(0, round(mean - chunk / 2))))
                if not batch.tokens:
                    continue
                part = self.cost.breakdown(batch)
                for name in ("compute", "memory", "network", "host", "flops", "bytes"):
                    setattr(total, name, getattr(total, name) + count * getattr(part, name))
        return total

    def utilization(self) -> tuple[float, float]:
        """(MFU, MBU): parts of the dense peak and of the memory bandwidth, over the whole run, at most 1."""
        device = self.cost.cluster.device
        seconds = self.duration * len(self.totals) * self.deployment.plan.pp
        if seconds <= 0:
            return 0.0, 0.0
        work = self.work
        peak = device.peak(self.deployment.dtype)
        return min(1.0, work.flops / seconds / peak), min(1.0, work.bytes / seconds / device.bandwidth)

    def joules(self) -> float:
        """Energy of all devices over the run: power = watts * (0.3 + 0.7 * the larger of MFU and MBU)."""
        power = self.cost.cluster.device.power
        return (
            self.duration * self.devices * power * (IDLE_SHARE + (1 - IDLE_SHARE) * max(self.utilization()))
        )

    def holds_for(self, other: Deployment) -> bool:
        """Whether a deployment that differs in its limits alone would have run exactly so: no limit of either was
        ever reached, neither of a step's tokens, nor of sequences, nor of pages."""
        mine = self.deployment
        if replace(mine, budget=other.budget, max_seqs=other.max_seqs) != other or self.preemptions:
            return False
        tokens = max(t.peak_tokens for t in self.totals)
        seqs = max(t.peak_seqs for t in self.totals)
        pages = min(self.memory.pages, device_memory(other, self.cost.cluster.device).pages)
        wanted = self.kv_peak * self.memory.pages + -(-mine.max_len // mine.block_size) + seqs
        return (
            tokens < min(mine.budget, other.budget)
            and seqs < min(mine.max_seqs, other.max_seqs)
            and wanted < pages
        )

    @property
    def bound(self) -> str:
        """What most of a step's time goes to: compute, memory, network or host."""
        return self.work.bound


def simulate(
    deployment: Deployment,
    cluster: Cluster,
    ops: Ops,
    workload: Workload,
    *,
    router: str | None = None,
    macro: bool = True,
    record: bool = False,
    cost: PlanCost | None = None,
) -> SimResult:
    """Run a workload to its end. router: None for the engine's own; clients of a closed loop are shared out evenly
    whatever it is. Raises InfeasibleError where one sequence does not fit."""
    router = router or deployment.engine.router
    cost = cost or PlanCost(deployment, cluster, ops)
    memory = device_memory(deployment, cluster.device)
    plan = deployment.plan
    count = plan.dp * plan.attention_dp
    # Of a closed loop, engines beyond its clients have nothing to do.
    served = count if workload.concurrency is None else min(count, workload.concurrency)
    whole = router != "round-robin" and workload.concurrency is None
    shares = [
        workload.rows if whole else workload.rows[i::served] if i < served else () for i in range(count)
    ]
    replicas = [Replica(cost, _at_most(memory, deployment, rows), macro, record) for rows in shares]
    routes: list[int] = []
    if workload.concurrency is not None:
        _closed_loop(replicas, workload, deployment.engine.request)
    else:
        routes = _open_loop(replicas, workload, router)
    finished = sorted((f for r in replicas for f in r.finished), key=lambda f: f.id)
    first = min(f.arrival for f in finished)
    return SimResult(
        deployment=deployment,
        cost=cost,
        memory=memory,
        finished=finished,
        duration=max(f.finished for f in finished) - first,
        totals=[r.totals for r in replicas],
        devices=plan.devices,
        preemptions=sum(r.stats.preemptions for r in replicas),
        kv_peak=max(r.stats.pages_peak for r in replicas) / memory.pages,
        routes=tuple(routes),
    )


def _at_most(memory: DeviceMemory, d: Deployment, rows: Sequence[TraceRow]) -> DeviceMemory:
    """No more pages than these requests could fill together, with the room that the scheduler keeps: as many as
    there are decide the same, and cost time to set up."""
    page = d.block_size
    most = sum(-(-(row.input_len + row.output_len) // page) + 1 for row in rows)
    return replace(memory, pages=min(memory.pages, max(most, -(-d.max_len // page)) + d.max_seqs))


def _open_loop(replicas: list[Replica], workload: Workload, router: str) -> list[int]:
    """Which engine got which request."""
    choose = make_router(router)
    alone = len(replicas) == 1  # nothing to choose: arrivals need not be simulated one by one
    routes: list[int] = []
    for index, row in enumerate(workload.rows):
        at = row.arrival or 0.0
        if choose.needs_load and not alone:
            for replica in replicas:
                replica.advance(at)
        request = sim_request(index, row, at)
        prompt = request.prompt if workload.shares_prefixes and not alone else ()
        routes.append(choose.pick([r.load for r in replicas], prompt))
        replicas[routes[-1]].add(request)
    for replica in replicas:
        replica.advance(math.inf)
    return routes


def _closed_loop(replicas: list[Replica], workload: Workload, turnaround: float) -> None:
    """Client i is served by engine i mod count, and each engine's clients take that engine's share of the rows. A
    client's next request is at the scheduler when its reply has gone back and the request has come: meanwhile the
    engine has begun another step."""
    assert workload.concurrency is not None
    count = min(len(replicas), workload.concurrency)
    for which, replica in enumerate(replicas[:count]):
        clients = len(range(which, workload.concurrency, count))
        rows = list(enumerate(workload.rows))[which::count]
        for index, row in rows[:clients]:
            replica.add(sim_request(index, row, 0.0))
        for seen, (index, row) in enumerate(rows[clients:]):
            if seen == len(replica.finished):
                replica.advance(math.inf, stop_at_finish=True)
            replica.add(sim_request(index, row, replica.finished[seen].finished + turnaround))
        replica.advance(math.inf)
