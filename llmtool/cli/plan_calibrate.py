"""`llmtool plan --calibrate`: bench results, ours, vLLM's or SGLang's, become an engine's constants on a device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmtool.bench.result import BenchResult, RunResult, read_result
from llmtool.cli.output import Output
from llmtool.cli.plan_problem import read_model
from llmtool.errors import UsageError
from llmtool.hardware import Cluster, find_device
from llmtool.plan.calibration import calibrate, store
from llmtool.plan.fit import Observation
from llmtool.plan.planfile import PlanFile, read_plan
from llmtool.sim.deployment import Deployment
from llmtool.sim.engines import FITTED, EngineProfile, find_engine
from llmtool.sim.grid import Tables
from llmtool.sim.ops import Ops, load_pack
from llmtool.sim.simulate import SimResult, simulate
from llmtool.sim.workload import Workload
from llmtool.workload.arrivals import gamma
from llmtool.workload.traces import TraceRow

# Figures beside the means, where a run has enough requests: under a load that varies they tell what a step costs
# from what a sequence in it adds.
PERCENTILES, ENOUGH = (10, 50, 90), 20
# How much wider the priors of kernels are where their efficiencies were not measured on this device.
FREEDOM = {"own": 1.0, "borrowed": 3.0, "none": 15.0}


def calibrate_from(output: Output, a: Mapping[str, Any]) -> None:
    if a["plan_file"] is None:
        raise UsageError(
            "Calibrating needs the plan that was benched.",
            "Give --plan plan.toml, as `llmtool plan -o` writes it.",
        )
    plan = read_plan(a["plan_file"])
    if plan.disaggregate:
        raise UsageError(
            f"The plan {a['plan_file']} has engines of their own for prompts, and constants are fitted on engines "
            "that do both.",
            "Bench a plan without --disaggregate.",
        )
    device = find_device(a["device"] or plan.device, a["devices_file"])
    base = find_engine(plan.engine, device.name)
    tables = Tables.load(a["tables"]) if a["tables"] else load_pack(device)
    freedom = FREEDOM["none" if tables is None else "own" if device.measured else "borrowed"]
    cluster = Cluster(device, plan.plan.devices, a["devices_per_node"])
    ops = Ops(device, tables)
    ir = read_model(a["model"] or plan.model)
    observations = []
    for path in a["calibrate"]:
        for run in read_runs(path):
            workload, measured = observed(path, run)
            deployment = deployment_of(plan, ir, base, workload)
            observations.append(Observation(_simulation(deployment, cluster, ops, workload), measured))
    with output.progress() as progress:
        progress("fitting the engine's constants", None)
        found = calibrate(base, observations, freedom)
    source = f"{len(observations)} runs: {', '.join(Path(p).name for p in a['calibrate'])}"
    target = store(device.name, found.profile, source)
    output.document(
        {
            "device": device.name,
            "engine": base.name,
            "path": str(target),
            "constants": {k: getattr(found.profile, k) for k in FITTED},
            "figures": [{"name": n, "measured": m, "before": b, "after": x} for n, m, b, x in found.errors],
        }
    )
    rows = [
        (n, f"{m:.4g}", f"{b:.4g} ({b / m - 1:+.0%})", f"{x:.4g} ({x / m - 1:+.1%})")
        for n, m, b, x in found.errors
    ]
    output.table(
        f"{base.name} on {device.title}", ("figure", "measured", "before", "after"), rows, f"Kept in {target}"
    )


def _simulation(deployment: Deployment, cluster: Cluster, ops: Ops, workload: Workload) -> Any:
    def run(profile: EngineProfile) -> SimResult:
        return simulate(replace(deployment, engine=profile), cluster, ops, workload)

    return run


def deployment_of(plan: PlanFile, ir: Any, engine: EngineProfile, workload: Workload) -> Deployment:
    s = plan.settings
    return Deployment(
        ir,
        plan.plan,
        engine,
        plan.dtype,
        plan.kv_dtype,
        int(s.get("max_num_batched_tokens", engine.budget)),
        int(s.get("max_num_seqs", engine.max_seqs)),
        max(int(s.get("max_model_len", 0)), workload.max_len),
        int(s.get("block_size", 16)),
        drafting=plan.drafting,
    )


def read_runs(path: str) -> list[RunResult]:
    """A result of llmtool or vLLM, or SGLang's JSON lines with --output-details, each line a run."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"Cannot read the result {path}: {e}.") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 or (lines and path.endswith(".jsonl")):
        try:
            rows = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            rows = []
        needed = {"input_lens", "output_lens", "ttfts", "itls", "errors", "duration"}
        if rows and all(isinstance(row, dict) and needed <= row.keys() for row in rows):
            return [RunResult.from_dict(row) for row in rows]
    result: BenchResult = read_result(path)
    return list(result.runs)


def observed(path: str, run: RunResult) -> tuple[Workload, dict[str, float]]:
    """The load of a run, as it arrived, and its figures. Raises UsageError where no request completed."""
    records = [r for r in run.records() if r.success and r.output_tokens > 0]
    if not records:
        raise UsageError(f"In {path} no request completed.")
    clients = run.metrics.get("max_concurrency")
    starts = [r.start for r in records]
    if clients is None and len({*starts}) == 1 and np.isfinite(run.request_rate):
        # No start times in the file: a process of the same rate stands for them.
        starts = gamma(len(records), run.request_rate, 1.0, np.random.default_rng(0)).tolist()
    order = sorted(range(len(records)), key=lambda i: (starts[i], records[i].index))
    rows = tuple(
        TraceRow(starts[i], max(1, records[i].prompt_tokens), records[i].output_tokens) for i in order
    )
    workload = Workload(Path(path).name, rows)
    duration = max(s + r.e2e for s, r in zip(starts, records, strict=True)) - min(starts)
    tpots = [r.tpot for r in records if r.tpot]
    measured = {
        "ttft": float(np.mean([r.ttft for r in records])) * 1e3,
        "throughput": sum(r.output_tokens for r in records) / duration,
    }
    if tpots:
        measured["tpot"] = float(np.mean(tpots)) * 1e3
    if len(tpots) >= ENOUGH:
        for name, values in (("ttft", [r.ttft for r in records]), ("tpot", tpots)):
            for p in PERCENTILES:
                measured[f"{name}_p{p}"] = float(np.percentile(values, p)) * 1e3
    return workload, measured
