"""The simulation of a deployment: it is the server's policy, macro-steps change nothing, and queueing laws hold."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Arrival, Engine
from llmtool.core.macro import quiet_steps
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import SchedulerOutput, StepResult, VirtualClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.core.steplog import decision
from llmtool.errors import InfeasibleError
from llmtool.hardware import Cluster, DeviceSpec
from llmtool.sim.deployment import Deployment
from llmtool.sim.disaggregate import Split, simulate_split, transfer_seconds
from llmtool.sim.memory import device_memory
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.replica import Finished, PlanExecutor, Replica
from llmtool.sim.stepcost import Batch, PlanCost
from llmtool.sim.workload import Workload, sim_request
from llmtool.workload.traces import TraceRow
from tests.plan.made import deployment, device, load, run
from tests.support.core import MemoryExecutor

TIGHT = 446_000_000  # bytes of device memory that leave a few dozen pages


def tight(d: Deployment, pages: int = 39) -> DeviceSpec:
    """A device on which a deployment has so many pages left."""
    low, high = 0, 2 * 10**9
    while high - low > 1000:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if device_memory(d, device(memory=middle)).pages >= pages else (middle, high)
        )
    return device(memory=high)


def facts(f: Finished) -> tuple[float, ...]:
    return f.arrival, f.first_scheduled, f.first_token, f.finished, f.output_tokens


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([3.0, 30.0, 300.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 1, 2, 3, 4]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_macro_steps_change_nothing(
    seed: int, rate: float, short: bool, closed: bool, pp: int, caching: bool
) -> None:
    """With pages in plenty and short (preemptions), under a rate and in a closed loop, in pipelines: moments,
    counters, steps."""
    workload = load(25, None if closed else rate, seed, clients=6 if closed else None)
    d = deployment(ParallelPlan(pp=pp), max_len=400, prefix_caching=caching)
    spec = tight(d) if short else device()
    fast, slow = (run(d, workload, spec, macro=macro) for macro in (True, False))
    assert [facts(f) for f in fast.finished] == [facts(f) for f in slow.finished]
    assert fast.preemptions == slow.preemptions and fast.kv_peak == slow.kv_peak
    for a, b in zip(fast.totals, slow.totals, strict=True):
        assert (a.steps, a.decodes, a.decode_context) == (b.steps, b.decodes, b.decode_context)
        assert (a.prompt_tokens, a.peak_seqs, a.peak_tokens) == (b.prompt_tokens, b.peak_seqs, b.peak_tokens)


def test_chunks_of_a_preempted_sequence_in_flight_are_not_quiet() -> None:
    """It has output already, and yet computes its prompt again, in several steps at once."""
    d = deployment(ParallelPlan(pp=3), max_len=400, max_seqs=8, budget=64)
    fast, slow = (run(d, load(12, 10.0, 1), tight(d), macro=macro) for macro in (True, False))
    assert [facts(f) for f in fast.finished] == [facts(f) for f in slow.finished]
    assert fast.preemptions == slow.preemptions > 0


@pytest.mark.parametrize("pp", [1, 3])
def test_tight_memory_preempts(pp: int) -> None:
    d = deployment(ParallelPlan(pp=pp), max_len=400)
    result = run(d, load(25, 300.0, 1), tight(d))
    assert result.preemptions > 0 and result.kv_peak > 0.8


def test_a_pipeline_takes_most_of_its_steps_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = Engine.step

    def counted(self: Engine) -> object:
        taken.append(1)
        return real(self)

    monkeypatch.setattr(Engine, "step", counted)
    result = run(deployment(ParallelPlan(pp=4)), load(25, 5.0, 1))
    assert len(taken) < result.totals[0].steps / 3


class _Served:
    """What `serve` runs: an executor that checks the KV it reads, told by the cost model how long its steps
    take."""

    max_in_flight = 1

    def __init__(self, inner: MemoryExecutor, cost: PlanCost) -> None:
        self._inner, self._cost = inner, cost
        self.decisions: list[dict[str, object]] = []
        self._seconds = 0.0

    def submit(self, out: SchedulerOutput) -> None:
        self.decisions.append(decision(out))
        self._inner.submit(out)
        batch = Batch()
        for s in out.scheduled:
            if s.num_tokens == 1 and s.start:
                batch.decodes += 1
                batch.decode_context += s.start + 1
            else:
                batch.chunks.append((s.num_tokens, s.start))
            batch.samples += s.sample
        self._seconds = self._cost.seconds(batch) if out.scheduled else 0.0

    def collect(self) -> StepResult:
        result = self._inner.collect()
        result.seconds = self._seconds
        result.tokens = [[1] if t else [] for t in result.tokens]
        return result


class _Recording(PlanExecutor):
    decisions: list[dict[str, object]]

    def submit(self, out: SchedulerOutput) -> None:
        self.decisions.append(decision(out))
        super().submit(out)


@pytest.mark.parametrize("memory", [2 * 10**9, TIGHT])
def test_serve_and_plan_take_the_same_steps(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine with a fake executor, as `serve` drives it, and the planner's replica: equal decisions step by
    step, page numbers and all."""
    spec = device(memory=memory)
    d = deployment(ParallelPlan(), max_len=400)
    cost = PlanCost(d, Cluster(spec, 1), Ops(spec, None))
    budget = device_memory(d, spec)
    monkeypatch.setattr("llmtool.sim.replica.PlanExecutor", _Recording)
    _Recording.decisions = []
    replica = Replica(cost, budget, macro=False)
    workload = load(20, 100.0, 3)
    requests = [sim_request(i, row, row.arrival or 0.0) for i, row in enumerate(workload.rows)]
    for request in requests:
        replica.add(request)
    replica.advance(math.inf)

    scheduler = Scheduler(
        SchedulerConfig(d.max_seqs, d.budget, d.max_len, 10**9),
        UniformAllocator(budget.group, budget.pages, prefix_caching=False),
    )
    served = _Served(MemoryExecutor(budget.group), cost)
    engine = Engine(scheduler, served, VirtualClock())
    arrivals = [
        Arrival(r.at, r.id, r.prompt, SamplingParams(max_tokens=r.output, temperature=0.0, ignore_eos=True))
        for r in requests
    ]
    for _ in engine.run_trace(arrivals):
        pass
    assert len(served.decisions) > 50
    assert _Recording.decisions == served.decisions


def test_zero_load_is_prefill_and_single_steps() -> None:
    d = deployment(ParallelPlan(tp=2))
    workload = Workload("one", (TraceRow(0.0, 300, 5),))
    result = run(d, workload)
    cost = result.cost
    prefill = [
        cost.seconds(Batch(chunks=[(128, 0)])),
        cost.seconds(Batch(chunks=[(128, 128)])),
        cost.seconds(Batch(chunks=[(44, 256)], samples=1)),
    ]
    decode = [cost.seconds(Batch(1, 301 + i, samples=1)) for i in range(4)]
    assert result.statistic("ttft", None) == pytest.approx((sum(prefill) + 1e-3) * 1e3)
    assert result.statistic("tpot", None) == pytest.approx(sum(decode) / 4 * 1e3)


@pytest.mark.parametrize("rate", [5.0, 50.0])
def test_littles_law_and_work_conservation(rate: float) -> None:
    workload = load(200, rate, 5)
    result = run(deployment(ParallelPlan()), workload)
    made = sum(t.decodes + t.prompt_tokens for t in result.totals)
    assert made == sum(r.input_len + r.output_len - 1 for r in workload.rows)
    events = sorted([(f.arrival, 1) for f in result.finished] + [(f.finished, -1) for f in result.finished])
    inside, area, last = 0, 0.0, events[0][0]
    for at, change in events:
        area += inside * (at - last)
        inside, last = inside + change, at
    mean_time = sum(f.finished - f.arrival for f in result.finished) / 200
    assert area / result.duration == pytest.approx(200 / result.duration * mean_time)
    busy = result.totals[0].busy
    assert busy <= result.duration * (1 + 1e-9)
    if rate == 50.0:  # saturated: never idle
        assert busy == pytest.approx(result.duration, rel=1e-6)


def test_a_client_s_next_request_takes_a_turn_to_come() -> None:
    """One client: nothing overlaps. Several that end together meet a step that has begun without them."""
    d = deployment(ParallelPlan(), max_len=600)
    turn = d.engine.request
    alone = run(d, load(6, None, clients=1))
    for before, after in zip(alone.finished, alone.finished[1:], strict=False):
        assert after.arrival == pytest.approx(before.finished + turn)
    assert alone.duration == pytest.approx(sum(r.e2e for r in alone.records) - turn)
    several = run(d, load(40, None, clients=4))
    later = [f for f in several.finished if f.arrival > 0]
    ended = {f.finished for f in several.finished}
    assert later and all(f.arrival not in ended and f.first_scheduled >= f.arrival for f in later)


def test_fewer_clients_than_engines_lose_no_request() -> None:
    d, workload = deployment(ParallelPlan(dp=6), max_len=400), load(20, None, clients=4)
    result = run(d, workload, device(devices_per_node=6))
    assert [f.output_tokens for f in sorted(result.finished, key=lambda f: int(f.id))] == [
        r.output_len for r in workload.rows
    ]
    same = run(deployment(ParallelPlan(dp=4), max_len=400), workload)
    assert result.duration == same.duration and result.devices == 6


def test_replicas_scale_linearly_at_a_fixed_load_each() -> None:
    one = load(60, 20.0, 7)
    four = Workload("four", tuple(row for row in one.rows for _ in range(4)))
    single = run(deployment(ParallelPlan()), one)
    spread = run(deployment(ParallelPlan(dp=4)), four)
    assert spread.output_throughput == pytest.approx(4 * single.output_throughput)
    assert spread.statistic("tpot", 90) == pytest.approx(single.statistic("tpot", 90))


def test_the_least_loaded_engine_gets_the_next_request() -> None:
    """Long and short requests in turn: round robin gives one engine all the long ones."""
    rows = tuple(TraceRow(i * 0.02, 20, 200 if i % 2 == 0 else 2) for i in range(60))
    workload = Workload("uneven", rows)
    d = deployment(ParallelPlan(dp=2), max_seqs=4)
    turns, loads = (run(d, workload, router=name) for name in ("round-robin", "least-loaded"))
    assert loads.statistic("ttft", 90) < turns.statistic("ttft", 90)
    assert len(loads.finished) == len(turns.finished) == 60


def test_a_pipeline_overlaps_its_stages() -> None:
    """Two stages, each half the model: one sequence takes as long, many sequences up to twice as fast."""
    single = Workload("one", (TraceRow(0.0, 100, 50),))
    many = Workload("many", tuple(TraceRow(i * 0.005, 100, 50) for i in range(64)))
    whole, halves = deployment(ParallelPlan(), max_seqs=8), deployment(ParallelPlan(pp=2), max_seqs=16)
    assert run(halves, single).duration == pytest.approx(run(whole, single).duration, rel=0.1)
    gain = run(halves, many).output_throughput / run(whole, many).output_throughput
    assert 1.2 < gain <= 2.3


def test_shared_prefixes_are_computed_once() -> None:
    rows = tuple(TraceRow(i * 1.0, 1024 + 100, 4, (1, 2, 3 + i)) for i in range(6))
    d = deployment(ParallelPlan(), max_len=2048, budget=2048)
    plain, caching = (
        run(d, Workload("x", rows)),
        run(deployment(ParallelPlan(), max_len=2048, budget=2048, prefix_caching=True), Workload("x", rows)),
    )
    assert plain.totals[0].prompt_tokens == 6 * 1124
    assert [f.cached_tokens for f in caching.finished] == [0] + [1024] * 5
    assert caching.totals[0].prompt_tokens == 1124 + 5 * 100


def test_prefill_and_decode_apart() -> None:
    d = deployment(ParallelPlan())
    split = Split(d, deployment(ParallelPlan(), max_seqs=64))
    spec = device()
    cluster, ops = Cluster(spec, 2), Ops(spec, None)
    row = TraceRow(0.0, 100, 20)
    alone = simulate_split(split, cluster, ops, Workload("one", (row,)))
    whole = run(d, Workload("one", (row,)))
    moved = transfer_seconds(split, cluster, 100)
    assert moved > 100 * 8 * 2048 / spec.link
    assert alone.statistic("ttft", None) == pytest.approx(whole.statistic("ttft", None))
    # The handed prompt costs no step of its own but the one that makes the next token.
    assert alone.duration == pytest.approx(whole.duration + moved, rel=0.02)
    busy = load(80, 60.0, 2)
    apart = simulate_split(split, cluster, ops, busy)
    assert apart.devices == 2 and len(apart.finished) == 80
    assert apart.statistic("tpot", 99) < run(deployment(ParallelPlan(), max_seqs=64), busy).statistic(
        "tpot", 99
    )


def test_a_sequence_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="KV memory holds"):
        run(deployment(ParallelPlan(), max_len=8000), load(3), device(memory=TIGHT))


@pytest.mark.parametrize("caching", [False, True])
def test_pages_that_nothing_can_fill_change_nothing(caching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    d = deployment(ParallelPlan(dp=2), max_len=2048, budget=2048, prefix_caching=caching)
    rows = tuple(TraceRow(i * 0.01, 1024 + 100, 40, (1, 2, 3 + i % 5)) for i in range(40))
    fewer = run(d, Workload("x", rows))
    monkeypatch.setattr("llmtool.sim.simulate._at_most", lambda memory, d, rows: memory)
    whole = run(d, Workload("x", rows))
    assert [facts(f) for f in fewer.finished] == [facts(f) for f in whole.finished]
    assert fewer.kv_peak == whole.kv_peak > 0


def test_nothing_is_quiet_without_running_sequences() -> None:
    d = deployment(ParallelPlan())
    group = device_memory(d, device()).group
    scheduler = Scheduler(SchedulerConfig(4, 64, 512, 10), UniformAllocator(group, 40, prefix_caching=False))
    assert quiet_steps(scheduler, 100) == 0
    scheduler.add("a", [1] * 10, SamplingParams(max_tokens=5, ignore_eos=True), 0.0)
    assert quiet_steps(scheduler, 100) == 0  # its prompt comes first
    out = scheduler.schedule(0.0)
    assert quiet_steps(scheduler, 100) == 0  # a step is under way
    scheduler.update(out, StepResult(0, [[1]]), 1.0)
    assert quiet_steps(scheduler, 100) == 4 and quiet_steps(scheduler, 3) == 3
