"""Will speculation pay? The engine of a deployment on a virtual clock, with the controllers of `serve` and drafts
that are right so often.

The law of the drafts: at a moment a sequence has one with a chance of `coverage`, and each of its tokens is right
with a chance of `acceptance`, whatever came before. A verified token costs what another sequence's token costs, its
sequence's context is read once a step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Arrival, Engine
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import VirtualClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.core.speculation.build import controller_of
from llmtool.core.speculation.draft import MAX_DEPTH, NOTHING, Draft
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.stats import SpecCounters
from llmtool.errors import InfeasibleError, UsageError
from llmtool.sim.memory import DeviceMemory
from llmtool.sim.replica import TOKEN, PlanExecutor, SimRequest
from llmtool.sim.stepcost import PlanCost
from llmtool.workload.metrics import RequestRecord


class SyntheticProposer:
    """Drafts by the law above. Raises UsageError for chances outside [0, 1]."""

    name = "synthetic"

    def __init__(self, acceptance: float, coverage: float = 1.0, seed: int = 0) -> None:
        for name, value in (("acceptance", acceptance), ("coverage", coverage)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"The {name} of drafts must be between 0 and 1, not {value:g}.")
        self._acceptance, self._coverage = acceptance, coverage
        self._rng = random.Random(seed)

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        pass

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        pass

    def propose(self, seq: str, limit: int) -> Draft:
        rng = self._rng
        if rng.random() >= self._coverage:
            return NOTHING
        tokens = [
            TOKEN if rng.random() < self._acceptance else TOKEN + 1 for _ in range(min(limit, MAX_DEPTH))
        ]
        return Draft(tokens, self.name, 4)

    def finish(self, seq: str) -> None:
        pass


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
