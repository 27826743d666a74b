"""`llmtool bench --simulate`: what speculation would bring, by a device's data sheet and kernel efficiencies."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np

from llmtool.bench.config import BenchConfig
from llmtool.bench.counters import growth
from llmtool.bench.result import BenchResult, RunResult
from llmtool.bench.run import run_seed
from llmtool.cli.plan_problem import native, read_model
from llmtool.config import EngineConfig
from llmtool.core.stats import SpecCounters
from llmtool.errors import UsageError
from llmtool.hardware import Cluster
from llmtool.hardware.device import find_device
from llmtool.plan.calibration import engine_for
from llmtool.sim.deployment import Deployment
from llmtool.sim.memory import device_memory
from llmtool.sim.ops import Ops, load_pack
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.replica import TOKEN, SimRequest
from llmtool.sim.speculation import SyntheticProposer, simulate_speculation
from llmtool.sim.stepcost import PlanCost
from llmtool.workload.metrics import summarize

ALL_AT_ONCE = 1e9  # requests/s


def simulate(config: BenchConfig, engine: EngineConfig, acceptance: float, coverage: float) -> BenchResult:
    """A run per rate and kind of speculation, on one device. Raises UsageError, InfeasibleError, ModelError."""
    if engine.device in ("auto", "cpu", "cuda"):
        raise UsageError(
            "--simulate needs a device to simulate.", "Give --device, for example --device h100."
        )
    if engine.engines > 1:
        raise UsageError(
            "--simulate is of one engine.",
            "Leave out --data-parallel-size and --disaggregate; `llmtool plan` simulates several.",
        )
    if config.dataset.dataset_name != "random" or config.load.search_knee:
        raise UsageError(
            "--simulate takes made-up lengths and given rates.",
            "Give --random-input-len, --random-output-len and --request-rate.",
        )
    if engine.spec_branches != 1:
        raise UsageError("--simulate drafts one way on, not several.", "Leave --spec-branches out.")
    device, ir = find_device(engine.device), read_model(engine.model)
    profile, _ = engine_for(device.name, "llmtool")
    d = config.dataset
    longest = math.ceil((1 + d.random_range_ratio) * (d.random_input_len + d.random_output_len))
    deployment = Deployment(
        ir,
        ParallelPlan(),
        profile,
        native(ir),
        budget=engine.max_num_batched_tokens or profile.budget,
        max_seqs=engine.max_num_seqs,
        max_len=longest,
        block_size=engine.block_size,
    )
    cost = PlanCost(deployment, Cluster(device, 1), Ops(device, load_pack(device)))
    memory = device_memory(deployment, device)
    rates = config.load.request_rates or (config.load.request_rate,)
    runs = []
    for rate in rates:
        requests = _requests(config, rate)
        for spec in engine.spec.split(","):
            proposer = SyntheticProposer(acceptance, coverage, config.seed)
            run = simulate_speculation(cost, memory, requests, spec, proposer)
            metrics = summarize(
                run.records, run.duration, config.slos, config.metric_percentiles, config.seed
            )
            runs.append(RunResult(rate, metrics, server=_counted(run.spec) | {"spec": spec}))
    return BenchResult(
        kind="sweep",
        runs=tuple(runs),
        config=config.as_dict() | {"acceptance": acceptance, "coverage": coverage, "simulated": True},
        backend=f"simulated {device.name}",
        model=engine.model,
        seed=config.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware={"simulated": device.name},
        versions={},
        label=config.label,
    )


def _counted(spec: SpecCounters | None) -> dict[str, object]:
    if spec is None:
        return {}
    counters = {
        "spec_decode_num_drafts": float(spec.drafts),
        "spec_decode_num_draft_tokens": float(spec.draft_tokens),
        "spec_decode_num_accepted_tokens": float(spec.accepted_tokens),
    }
    return growth({}, counters) | {"speculation": spec.explain or {}}


def _requests(config: BenchConfig, rate: float) -> list[SimRequest]:
    """Poisson arrivals; the same for every kind of speculation."""
    d = config.dataset
    rng = np.random.default_rng(run_seed(config.seed, rate, 0))
    requests, now = [], 0.0
    for i in range(d.num_prompts):
        low, high = 1 - d.random_range_ratio, 1 + d.random_range_ratio
        lengths = [
            max(1, round(n * rng.uniform(low, high))) for n in (d.random_input_len, d.random_output_len)
        ]
        now += float(rng.exponential(1 / min(rate, ALL_AT_ONCE)))
        requests.append(SimRequest(str(i), now, [TOKEN] * lengths[0], lengths[1]))
    return requests
