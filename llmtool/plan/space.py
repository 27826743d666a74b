"""The space of plans: every way to spread a model over the devices, with an engine's budgets, and why some cannot
be.

Symmetric ones are enumerated once: replicas and ranks have no names, and an attention-DP plan of a dense model with
one MLP shard per group is a DP plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from llmtool.hardware import Cluster
from llmtool.plan.runnable import why_not_runnable
from llmtool.sim.deployment import Deployment, Drafting
from llmtool.sim.engines import EngineProfile
from llmtool.sim.ir import ModelIR
from llmtool.sim.memory import device_memory, stage_weights
from llmtool.sim.parallel import ParallelPlan, why_invalid


@dataclass(frozen=True, slots=True)
class SpaceOptions:
    """dtypes, kv_dtypes, budgets, max_seqs: what may be chosen from. fewer: also plans that leave devices idle.
    any_plan: also plans that the engine has no flags for. draftings: kinds of speculation, None for none."""

    engine: EngineProfile
    max_len: int
    dtypes: tuple[str, ...] = ("bf16",)
    kv_dtypes: tuple[str, ...] = ("bf16",)
    budgets: tuple[int, ...] = (2048, 8192)
    max_seqs: tuple[int, ...] = (64, 256)
    block_size: int = 16
    prefix_caching: bool = False
    fewer: bool = False
    any_plan: bool = False
    draftings: tuple[Drafting | None, ...] = (None,)


@dataclass
class Space:
    """feasible: what can run. rejected: counts by reason. examples: one rejected plan for each reason."""

    feasible: list[Deployment] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def enumerated(self) -> int:
        return len(self.feasible) + sum(self.rejected.values())

    def reject(self, reason: str, example: str, count: int = 1) -> None:
        self.rejected[reason] += count
        self.examples.setdefault(reason, example)


def parallel_plans(ir: ModelIR, devices: int) -> Iterator[ParallelPlan]:
    """Every plan on exactly `devices` devices, valid for the model or not."""
    for pp in _divisors(devices):
        for stage in _divisors(devices // pp):
            dp = devices // pp // stage
            for tp in _divisors(stage):
                adp = stage // tp
                for ep in _divisors(stage) if ir.is_moe else (1,):
                    base = ParallelPlan(tp, pp, dp, ep, adp)
                    yield base
                    uneven = balanced_layers(ir, pp)
                    if pp > 1 and uneven and uneven != base.stages(ir.num_layers):
                        yield replace(base, layers=uneven)


def balanced_layers(ir: ModelIR, pp: int) -> tuple[int, ...]:
    """Layers per stage such that the last stage, which also has the head, is not the slowest: () if there are too
    few layers."""
    if pp < 2 or pp > ir.num_layers:
        return ()
    layer = max(1, (ir.num_parameters - ir.embedding_parameters) // ir.num_layers)
    head = min(round(ir.embedding_parameters / layer), ir.num_layers // pp - 1)
    if head < 1:
        return ()
    base, rest = divmod(ir.num_layers + head, pp)
    sizes = [base + (1 if i < rest else 0) for i in range(pp)]
    sizes[-1] -= head
    return tuple(sizes) if min(sizes) >= 1 else ()


def build_space(ir: ModelIR, cluster: Cluster, options: SpaceOptions) -> Space:
    """Enumerate, and sort out what cannot run: indivisible shapes, then memory, by the real allocator's pages."""
    space = Space()
    counts = _divisors(cluster.num_devices) if options.fewer else [cluster.num_devices]
    variants = len(options.dtypes) * len(options.kv_dtypes) * len(options.budgets) * len(options.max_seqs)
    variants *= len(options.draftings)
    for devices in counts:
        for plan in parallel_plans(ir, devices):
            why = why_invalid(plan, ir)
            if why:
                space.reject("the model does not divide so", f"{plan}: {why}", variants)
                continue
            why = "" if options.any_plan else why_not_runnable(options.engine.name, plan, ir)
            if why:
                space.reject(f"{options.engine.name} has no flags for it", f"{plan}: {why}", variants)
                continue
            if plan.attention_dp > 1 and not ir.is_moe and plan.pp == 1 and plan.tp * plan.attention_dp > 8:
                space.reject("attention-DP of a dense model beyond a node", str(plan), variants)
                continue
            for deployment in _variants(ir, plan, options):
                if deployment.drafting is not None and plan.pp > 1:
                    space.reject("drafts need a step's tokens before the next begins", str(plan))
                    continue
                memory = device_memory(deployment, cluster.device)
                if memory.tokens < options.max_len:
                    reason = (
                        "weights do not fit" if memory.pages <= 0 else "KV memory holds no longest sequence"
                    )
                    space.reject(reason, f"{plan}: {memory.weights / 1e9:.1f} GB of weights a device")
                    continue
                space.feasible.append(deployment)
    return space


def _variants(ir: ModelIR, plan: ParallelPlan, o: SpaceOptions) -> Iterator[Deployment]:
    for dtype, kv_dtype, budget, seqs, drafting in product(
        o.dtypes, o.kv_dtypes, o.budgets, o.max_seqs, o.draftings
    ):
        yield Deployment(
            ir,
            plan,
            o.engine,
            dtype,
            kv_dtype,
            max(budget, seqs),
            seqs,
            o.max_len,
            o.block_size,
            o.prefix_caching,
            drafting,
        )


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def heuristic_plan(ir: ModelIR, cluster: Cluster, options: SpaceOptions) -> Deployment | None:
    """What people run without a planner: TP over a node and DP across nodes, the engine's own defaults (APEX,
    section 5.1). None where that does not divide or fit."""
    tp = min(cluster.num_devices, cluster.per_node)
    while tp >= 1:
        plan = ParallelPlan(tp=tp, dp=cluster.num_devices // tp)
        if cluster.num_devices % tp == 0 and not why_invalid(plan, ir):
            engine = options.engine
            deployment = replace(
                next(_variants(ir, plan, options)),
                budget=engine.budget,
                max_seqs=engine.max_seqs,
                drafting=None,
            )
            if device_memory(deployment, cluster.device).tokens >= options.max_len:
                return deployment
        tp //= 2
    return None


def smallest_cluster(ir: ModelIR, cluster: Cluster, options: SpaceOptions, limit: int = 4096) -> int | None:
    """The fewest devices (a power of two) of this kind that some plan fits on; None beyond `limit`."""
    count = 1
    while count <= limit:
        # Pure TP times PP leaves the most room; whole layers bound what PP can do.
        for plan in parallel_plans(ir, count):
            if plan.dp == 1 and plan.attention_dp == 1 and not why_invalid(plan, ir):
                deployment = next(_variants(ir, plan, options))
                if device_memory(deployment, cluster.device).tokens >= options.max_len:
                    return count
        count *= 2
    return None


def weights_of(deployment: Deployment) -> float:
    """Bytes of the whole model's weights in the deployment's type."""
    d = deployment
    return stage_weights(d.ir, ParallelPlan(), 0, d.ir.num_layers, d.dtype)
