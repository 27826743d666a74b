"""Disaggregated plans: which split of the devices into prefill and decode engines is best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmtool.errors import UsageError
from llmtool.hardware import Cluster
from llmtool.plan.objective import Objective, figures
from llmtool.plan.search import Progress
from llmtool.plan.space import SpaceOptions
from llmtool.sim.deployment import Deployment
from llmtool.sim.disaggregate import Split, simulate_split
from llmtool.sim.grid import Tables
from llmtool.sim.ir import ModelIR
from llmtool.sim.memory import device_memory
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan, why_invalid
from llmtool.sim.workload import Workload

HEAD = 64  # requests that a first round is judged on
FULL = 6  # splits simulated in full


def splits(ir: ModelIR, cluster: Cluster, options: SpaceOptions) -> Iterator[Split]:
    """TP engines on each side, all devices used; mixtures of experts also with EP over the engine."""
    dtype, kv_dtype = options.dtypes[0], options.kv_dtypes[0]
    sizes = [t for t in (1, 2, 4, 8, 16) if t <= min(cluster.per_node, cluster.num_devices)]

    def side(tp: int, dp: int, ep: int) -> Deployment | None:
        plan = ParallelPlan(tp=tp, dp=dp, ep=ep)
        if why_invalid(plan, ir):
            return None
        seqs = max(options.max_seqs)
        d = Deployment(
            ir, plan, options.engine, dtype, kv_dtype, max(*options.budgets, seqs), seqs, options.max_len,
            options.block_size,
        )  # fmt: skip
        return d if device_memory(d, cluster.device).tokens >= options.max_len else None

    for p_tp in sizes:
        for d_tp in sizes:
            for p_dp in range(1, cluster.num_devices // p_tp + 1):
                left = cluster.num_devices - p_tp * p_dp
                if left <= 0 or left % d_tp:
                    continue
                for joined in (False, True) if ir.is_moe else (False,):
                    prefill = side(p_tp, p_dp, p_tp if joined else 1)
                    decode = side(d_tp, left // d_tp, d_tp if joined else 1)
                    if prefill is not None and decode is not None:
                        yield Split(prefill, decode)


def better_split(rows: Sequence[dict[str, Any]], meets_slos: bool, loss: float) -> dict[str, Any] | None:
    """The best split, if it beats a plan whose engines do both, and if this engine can run it: on engines of one
    device."""
    best = rows[0] if rows else None
    if best is None or best["devices_per_engine"] != [1, 1]:
        return None
    return best if (not best["meets_slos"], best["loss"]) < (not meets_slos, loss) else None


def best_split(
    ir: ModelIR,
    cluster: Cluster,
    tables: Tables | None,
    options: SpaceOptions,
    workload: Workload,
    objective: Objective,
    progress: Progress = lambda text, fraction: None,
) -> list[dict[str, Any]]:
    """The best splits with their figures, best first. Raises UsageError for a closed loop."""
    if workload.concurrency is not None:
        raise UsageError("Disaggregated plans are simulated under a request rate.", "Give --request-rate.")
    ops = Ops(cluster.device, tables)
    head = workload.head(min(HEAD, len(workload.rows)))
    found = list(splits(ir, cluster, options))
    scored = []
    for i, split in enumerate(found):
        progress(f"disaggregated: {i} of {len(found)} splits", i / max(1, len(found)))
        result = simulate_split(split, cluster, ops, head)
        scored.append((not result.meets(objective.slos), objective.loss(result), i))
    out = []
    for _, _, i in sorted(scored)[:FULL]:
        result = simulate_split(found[i], cluster, ops, workload)
        prefill, decode = found[i].prefill, found[i].decode
        row = {
            "prefill": f"{prefill.plan}",
            "decode": f"{decode.plan}",
            "engines": [prefill.plan.dp, decode.plan.dp],
            "devices_per_engine": [prefill.plan.engine, decode.plan.engine],
            "max_num_batched_tokens": prefill.budget,
            "max_num_seqs": prefill.max_seqs,
        }
        out.append(
            {**row, "loss": objective.loss(result), "devices": result.devices, **figures(result, objective)}
        )
    return sorted(out, key=lambda row: (not row["meets_slos"], row["loss"]))
