"""Small models and clusters that simulate in milliseconds."""

from __future__ import annotations

import random
from typing import Any

from llmtool.hardware import Cluster, DeviceSpec
from llmtool.sim.deployment import Deployment
from llmtool.sim.engines import EngineProfile
from llmtool.sim.ir import ModelIR, read_ir
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.simulate import SimResult, simulate
from llmtool.sim.workload import Workload
from llmtool.workload.traces import TraceRow

ENGINE = EngineProfile("test", host_step=1e-4, host_seq=1e-6, request=1e-3, reserve=0)


def device(**changes: Any) -> DeviceSpec:
    facts: dict[str, Any] = {
        "name": "toy",
        "title": "Toy",
        "flops": {"bf16": 20e12, "fp8": 40e12},
        "memory": 2 * 10**9,
        "bandwidth": 200e9,
        "link": 20e9,
        "network": 5e9,
        "power": 100.0,
        "devices_per_node": 4,
    }
    return DeviceSpec(**(facts | changes))


def dense(layers: int = 8, hidden: int = 1024) -> ModelIR:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    }
    return read_ir(config, "toy-dense")


def mixture(layers: int = 4) -> ModelIR:
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    }
    return read_ir(config, "toy-mixture")


def load(
    count: int, rate: float | None = 20.0, seed: int = 0, longest: int = 200, clients: int | None = None
) -> Workload:
    rng = random.Random(seed)
    at, rows = 0.0, []
    for _ in range(count):
        rows.append(TraceRow(None if rate is None else at, rng.randint(1, longest), rng.randint(1, longest)))
        at += rng.expovariate(rate) if rate else 0.0
    return Workload("toy", tuple(rows), clients)


def deployment(plan: ParallelPlan, ir: ModelIR | None = None, **changes: Any) -> Deployment:
    facts: dict[str, Any] = {"budget": 128, "max_seqs": 16, "max_len": 512}
    return Deployment(ir or dense(), plan, ENGINE, **(facts | changes))


def run(d: Deployment, workload: Workload, spec: DeviceSpec | None = None, **options: Any) -> SimResult:
    spec = spec or device()
    return simulate(d, Cluster(spec, d.plan.devices), Ops(spec, None), workload, **options)
