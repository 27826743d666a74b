"""Will speculation pay? The engine of a deployment on a virtual clock, with the controllers of `serve` and drafts
that are right so often (drafts.py); requests as bench records them, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Arrival, Engine
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import VirtualClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.core.speculation.build import controller_of
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.stats import SpecCounters
from llmtool.errors import InfeasibleError
from llmtool.sim.drafts import SyntheticProposer
from llmtool.sim.memory import DeviceMemory
from llmtool.sim.replica import PlanExecutor, SimRequest
from llmtool.sim.stepcost import PlanCost
from llmtool.workload.metrics import RequestRecord


@dataclass(frozen=True, slots=True)
class SpecRun:
    """records: as bench makes them. duration: seconds. spec: None without speculation."""

    records: list[RequestRecord]
    duration: float
    spec: SpecCounters | None


def simulate_speculation(
    cost: PlanCost,
    memory: DeviceMemory,
    requests: Sequence[SimRequest],
    spec: str,
    proposer: SyntheticProposer,
) -> SpecRun:
    """Run `requests` to their end on one engine. spec: as `--spec` has it.

    Raises InfeasibleError where the longest request does not fit, UsageError for an unknown spec.
    """
    d = cost.deployment
    if memory.tokens < d.max_len:
        raise InfeasibleError(
            f"KV memory for {max(0, memory.tokens)} tokens is left, and the longest request has {d.max_len}.",
            "Take a larger device or a smaller model.",
        )
    controller = controller_of(spec)
    drafts = None if controller is None else Speculator(controller, proposer)
    clock = VirtualClock()
    allocator = UniformAllocator(memory.group, memory.pages, prefix_caching=False)
    config = SchedulerConfig(d.max_seqs, d.budget, d.max_len, len(requests))
    engine = Engine(Scheduler(config, allocator, (), drafts), PlanExecutor(cost, clock), clock)
    arrivals = [
        Arrival(r.at, r.id, r.prompt, SamplingParams(max_tokens=r.output, temperature=0, ignore_eos=True))
        for r in requests
    ]
    records = {
        r.id: RequestRecord(i, r.at, prompt_tokens=len(r.prompt), max_tokens=r.output, counted=True)
        for i, r in enumerate(requests)
    }
    last: dict[str, float] = {}
    for output in engine.run_trace(arrivals):
        record, now = records[output.request_id], clock.now()
        if record.output_tokens:
            record.itls.append(now - last[output.request_id])
        else:
            record.ttft = now - record.start
        record.output_tokens += len(output.token_ids)
        last[output.request_id] = now
        if output.finish_reason is not None:
            record.e2e, record.success = now - record.start, True
    return SpecRun(list(records.values()), clock.now(), engine.stats.spec)
