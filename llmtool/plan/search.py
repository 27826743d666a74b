"""The search: bounds, then successive halving on the head of the trace, then full simulation, best bound first.

What is thrown out before a full simulation is either proven worse (its bound is worse than what another plan
does) or lost a round of halving by more than SLACK. `exhaustive` simulates everything instead; tests hold both to
the same winner.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from llmtool.errors import InfeasibleError
from llmtool.hardware import Cluster
from llmtool.plan.bounds import bounds_of
from llmtool.plan.objective import Objective, figures
from llmtool.plan.space import Space
from llmtool.sim.deployment import Deployment
from llmtool.sim.grid import Tables
from llmtool.sim.memory import device_memory
from llmtool.sim.ops import Ops
from llmtool.sim.simulate import SimResult, simulate
from llmtool.sim.stepcost import PlanCost
from llmtool.sim.workload import Workload

SLACK = 0.15  # a plan this much behind the best of a round stays
KEEP = 0.25  # and at least this part of the round
ROUNDS = (0.06, 0.25)  # parts of the trace
SMALLEST = 48  # requests of a round at least
FULL = 12  # plans that need no round
MOST = 24  # plans simulated in full at most, when there were rounds; their variants in limits not counted

Progress = Callable[[str, float | None], None]


@dataclass
class Outcome:
    """One plan and how far it came. stage: bounded | halved | simulated. loss: of the last simulation, else the
    bound. figures: of a full simulation."""

    deployment: Deployment
    stage: str
    loss: float
    why_not: str = ""
    bound: float = 0.0
    meets: bool = True
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[bool, float]:
        return (not self.meets, self.loss)


@dataclass
class SearchResult:
    """outcomes: simulated ones first, best first, then the rest. workload: what they were simulated on."""

    outcomes: list[Outcome]
    space: Space
    workload: Workload
    objective: Objective

    @property
    def simulated(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.stage == "simulated"]

    @property
    def best(self) -> Outcome:
        return self.simulated[0]

    def counts(self) -> dict[str, int]:
        stages = [o.stage for o in self.outcomes]
        return {
            "enumerated": self.space.enumerated,
            "infeasible": sum(self.space.rejected.values()),
            "bounded_out": stages.count("bounded"),
            "halved_out": stages.count("halved"),
            "simulated": stages.count("simulated"),
        }


class Simulator:
    """Simulates deployments on a cluster, in this process or in a worker; costs are shared between budgets."""

    def __init__(self, cluster: Cluster, tables: Tables | None, router: str | None = None) -> None:
        self.cluster = cluster
        self.router = router
        self.ops = Ops(cluster.device, tables)
        self._costs: dict[Any, PlanCost] = {}

    def cost(self, d: Deployment) -> PlanCost:
        key = (d.plan, d.dtype, d.kv_dtype, d.engine)
        if key not in self._costs:
            self._costs[key] = PlanCost(d, self.cluster, self.ops)
        return self._costs[key]

    def run(
        self, variants: Sequence[Deployment], workload: Workload, objective: Objective, full: bool
    ) -> list[dict[str, Any]]:
        """Of plans that differ in their limits alone: loss, whether the SLOs are met and, of a full run, figures.
        Where no limit was reached, one run stands for all."""
        out: list[dict[str, Any]] = []
        done: list[tuple[SimResult, dict[str, Any]]] = []
        for d in variants:
            found = next((row for result, row in done if result.holds_for(d)), None)
            if found is None:
                cost = self.cost(d).for_deployment(d)
                result = simulate(d, self.cluster, self.ops, workload, router=self.router, cost=cost)
                found = {"loss": objective.loss(result), "meets": result.meets(objective.slos)}
                if full:
                    found["figures"] = figures(result, objective)
                done.append((result, found))
            out.append(found)
        return out


_worker: Simulator | None = None


def _start_worker(cluster: Cluster, tables: Tables | None, router: str | None) -> None:
    global _worker
    _worker = Simulator(cluster, tables, router)


Job = tuple[list[Deployment], Workload, Objective, bool]


def _work(job: Job) -> list[dict[str, Any]]:
    assert _worker is not None
    return _worker.run(*job)


def search(
    space: Space,
    cluster: Cluster,
    tables: Tables | None,
    workload: Workload,
    objective: Objective,
    *,
    exhaustive: bool = False,
    must: Sequence[Deployment] = (),
    processes: int | None = None,
    router: str | None = None,
    progress: Progress = lambda text, fraction: None,
) -> SearchResult:
    """Find the best plan. must: plans that are simulated in any case, such as the heuristic one.

    Raises InfeasibleError where no plan fits.
    """
    simulator = Simulator(cluster, tables, router)
    deployments = list(dict.fromkeys([*must, *space.feasible]))
    if not deployments:
        raise InfeasibleError("No plan fits.")
    outcomes = []
    for i, d in enumerate(deployments):
        if i % 16 == 0:
            progress(f"bounds: {i} of {len(deployments)} plans", 0.1 * i / len(deployments))
        memory = device_memory(d, cluster.device)
        bounds = bounds_of(simulator.cost(d), d, memory, workload)
        bound = objective.least_loss(bounds, d, workload, cluster.device.power)
        outcomes.append(Outcome(d, "pending", bound, bounds.misses(objective.slos), bound))
    workers = processes or min(len(deployments), os.cpu_count() or 1)
    # A pool takes half a second to start: only where there is work for longer.
    busy = len(deployments) * len(workload.rows) > 4000
    context = get_context("spawn")
    pool = (
        ProcessPoolExecutor(workers, context, _start_worker, (cluster, tables, router))
        if workers > 1 and busy
        else None
    )
    try:
        _Search(simulator, workload, objective, pool, workers, progress).run(outcomes, exhaustive, set(must))
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    simulated = sorted((o for o in outcomes if o.stage == "simulated"), key=lambda o: o.rank)
    others = sorted((o for o in outcomes if o.stage != "simulated"), key=lambda o: (o.stage, o.loss))
    return SearchResult([*simulated, *others], space, workload, objective)


class _Search:
    def __init__(
        self,
        simulator: Simulator,
        workload: Workload,
        objective: Objective,
        pool: Executor | None,
        workers: int,
        progress: Progress,
    ) -> None:
        self._simulator = simulator
        self._workload = workload
        self._objective = objective
        self._pool = pool
        self._workers = workers
        self._progress = progress
        self._best = float("inf")  # of the plans simulated in full that meet the SLOs

    def run(self, outcomes: list[Outcome], exhaustive: bool, must: set[Deployment]) -> None:
        if exhaustive:
            self._simulate_in_full(outcomes, True)
            return
        for o in outcomes:
            if o.why_not and o.deployment not in must:
                o.stage = "bounded"
        candidates = [o for o in outcomes if o.stage == "pending"]
        if not candidates:  # every plan is hopeless: the closest ones are simulated, to say by how much
            candidates = sorted(outcomes, key=lambda o: o.bound)[:FULL]
        # The plans asked for and the most promising ones set the mark that bounds are held against.
        order = sorted(candidates, key=lambda o: o.bound)
        # Pipelines are left for later: their steps overlap and have to be simulated one by one.
        cheap = [o for o in order if o.deployment.plan.pp == 1] or order
        seeds = [o for o in order if o.deployment in must or o in cheap[:2]]
        self._simulate_in_full(seeds, False)
        rest = self._drop_beaten([o for o in order if o.stage != "simulated"])
        self._simulate_in_full(self._halve(rest), False)

    def _drop_beaten(self, candidates: list[Outcome]) -> list[Outcome]:
        """Without those whose bound is worse than what a simulated plan does."""
        stay = []
        for o in candidates:
            if o.bound > self._best:
                o.stage = "bounded"
                o.why_not = f"it can reach {self._objective.describe(o.bound)} at best"
            else:
                stay.append(o)
        return stay

    def _halve(self, candidates: list[Outcome]) -> list[Outcome]:
        """Rounds on the head of the trace; what stays is everything near the best and a part of the rest."""
        rounds = 0
        for part in ROUNDS:
            count = max(SMALLEST, round(part * len(self._workload.rows)))
            if len(candidates) <= FULL or count * 2 > len(self._workload.rows):
                continue
            rounds += 1
            head = self._workload.head(count)
            for o, found in self._map(candidates, head, False, f"round of {count} requests"):
                o.loss, o.meets = found["loss"], found["meets"]
            order = sorted(candidates, key=lambda o: o.rank)
            best = order[0]
            keep = max(FULL, round(KEEP * len(order)))
            stay = []
            for i, o in enumerate(order):
                near = o.meets == best.meets and o.loss <= best.loss * (1 + SLACK)
                if i < keep or (near and i < 2 * keep):
                    stay.append(o)
                else:
                    o.stage = "halved"
                    o.why_not = (
                        f"{self._objective.describe(o.loss)} on the first {count} requests, where the best of the "
                        f"round made {self._objective.describe(best.loss)}"
                    )
            candidates = stay
        return self._most(candidates) if rounds else candidates

    @staticmethod
    def _most(candidates: list[Outcome]) -> list[Outcome]:
        """The best of the last round, up to MOST plans."""
        plans: set[Any] = set()
        stay = []
        for o in candidates:
            key = (o.deployment.plan, o.deployment.dtype, o.deployment.kv_dtype)
            if key in plans or len(plans) < MOST:
                plans.add(key)
                stay.append(o)
            else:
                o.stage = "halved"
                o.why_not = f"{MOST} plans were ahead of it after the last round"
        return stay

    def _simulate_in_full(self, candidates: list[Outcome], exhaustive: bool) -> None:
        """Best first; what others' results rule out meanwhile is not simulated."""
        order, done = sorted(candidates, key=lambda o: o.loss), 0
        while order:
            if not exhaustive:
                order = self._drop_beaten(order)
            batch = self._next_plans(order, 2 * self._workers)
            order = order[len(batch) :]
            text = f"simulating: {done} of {len(candidates)} plans"
            at = 0.5 + 0.5 * done / max(1, len(candidates))
            for o, result in self._map(batch, self._workload, True, text, at):
                o.stage, o.loss, o.meets = "simulated", result["loss"], result["meets"]
                o.figures, o.why_not = result["figures"], ""
                if o.meets:
                    self._best = min(self._best, o.loss)
            done += len(batch)

    @staticmethod
    def _next_plans(order: list[Outcome], count: int) -> list[Outcome]:
        """The head of the order that spans `count` plans: variants of one in a row cost hardly more than one."""
        seen: set[Any] = set()
        for i, o in enumerate(order):
            seen.add((o.deployment.plan, o.deployment.dtype, o.deployment.kv_dtype))
            if len(seen) > count:
                return order[:i]
        return order

    def _map(
        self, outcomes: Sequence[Outcome], workload: Workload, full: bool, text: str, at: float | None = None
    ) -> list[tuple[Outcome, dict[str, Any]]]:
        """Simulate; plans that differ in their limits alone go together, the least limited first."""
        self._progress(text, at)
        groups: dict[Any, list[Outcome]] = {}
        for o in outcomes:
            d = o.deployment
            groups.setdefault((d.plan, d.dtype, d.kv_dtype, d.drafting), []).append(o)
        for group in groups.values():
            group.sort(key=lambda o: (-o.deployment.budget, -o.deployment.max_seqs))
        jobs: list[Job] = [
            ([o.deployment for o in group], workload, self._objective, full) for group in groups.values()
        ]
        if self._pool is None:
            found = [self._simulator.run(*job) for job in jobs]
        else:
            found = list(self._pool.map(_work, jobs))
        return [
            pair
            for group, rows in zip(groups.values(), found, strict=True)
            for pair in zip(group, rows, strict=True)
        ]
