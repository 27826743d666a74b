"""APEX's headline shape (2411.17651): how much faster is the plan that is found than the one people take?

python benchmarks/plan/headline.py [--requests 200]

Models x clusters x workloads, all **simulated** with the built-in efficiencies. The heuristic plan is TP over a
node and DP across nodes, with the engine's default limits (APEX, section 5.1). Load: requests arrive twice as
fast as the heuristic plan serves them when all are queued at once, so that speed shows; speedup: mean end-to-end
latency, and output tokens per second, heuristic over found.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import save

from llmtool.hardware import Cluster, find_device
from llmtool.modelspec.catalogue import published
from llmtool.plan.objective import Objective
from llmtool.plan.search import search
from llmtool.plan.space import SpaceOptions, build_space, heuristic_plan
from llmtool.plan.workloads import make_workload
from llmtool.sim.engines import find_engine
from llmtool.sim.ir import read_ir
from llmtool.sim.ops import Ops, load_pack
from llmtool.sim.simulate import simulate

CASES = [
    ("llama-3.1-70b", "bf16", "h100", 8),
    ("llama-3.1-70b", "bf16", "h100", 16),
    ("llama-3.1-8b", "bf16", "h100", 8),
    ("mixtral-8x22b", "bf16", "h100", 8),
    ("qwen3-235b-a22b", "fp8_block", "h200", 8),
    ("qwen2.5-32b", "bf16", "l40s", 8),
]
WORKLOADS = ("chat", "code", "summarization")


def one(model: str, dtype: str, device_name: str, devices: int, workload: str, count: int) -> dict[str, Any]:
    config = published(model)
    assert config is not None
    ir, device = read_ir(config, model), find_device(device_name)
    cluster, tables = Cluster(device, devices), load_pack(device)
    queued = make_workload(workload, count, concurrency=count)
    options = SpaceOptions(
        find_engine("vllm", device_name), queued.max_len, (dtype,), max_seqs=(64, 256, 512)
    )
    heuristic = heuristic_plan(ir, cluster, options)
    assert heuristic is not None
    full = simulate(heuristic, cluster, Ops(device, tables), queued)
    rate = 2.0 * count / full.duration
    load = make_workload(workload, count, request_rate=rate)
    out: dict[str, Any] = {
        "model": model,
        "cluster": f"{devices} x {device.title}",
        "workload": workload,
        "rate": round(rate, 2),
    }
    space = build_space(ir, cluster, options)
    for kind in ("latency", "throughput"):
        result = search(space, cluster, tables, load, Objective(kind), must=[heuristic], processes=2)
        base = next(o for o in result.simulated if o.deployment == heuristic)
        best = result.best
        out[kind] = {
            "found": f"{best.deployment.plan}, {best.deployment.budget} tokens, {best.deployment.max_seqs} seqs",
            "heuristic": str(base.deployment.plan),
            "speedup": round(base.loss / best.loss, 3),
            "energy_saved": round(
                1 - best.figures["joules_per_million_tokens"] / base.figures["joules_per_million_tokens"], 3
            ),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    rows = []
    for case in CASES:
        for workload in WORKLOADS:
            rows.append(one(*case, workload, args.requests))
            print(json.dumps(rows[-1]), flush=True)
    best = {kind: max(r[kind]["speedup"] for r in rows) for kind in ("latency", "throughput")}
    save("headline", {"simulated": True, "requests": args.requests, "largest_speedup": best, "rows": rows})


if __name__ == "__main__":
    main()
