"""The cost model as the second executor, and contiguous memory as the past it is compared with."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Arrival, Engine
from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.contiguous import ContiguousAllocator
from llmtool.core.memory.geometry import LayerCacheSpec, uniform_group
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import VirtualClock
from llmtool.core.request import BeamParams, SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.errors import UsageError
from llmtool.sim.cost import LinearStepCost, fit_linear
from llmtool.sim.executor import CostModelExecutor, TokenContext

LAYERS = [LayerCacheSpec(0, 2, 8, 8, 2)]
COST = LinearStepCost(fixed=0.01, token=0.001, kv=1e-5, request=0.002)


def engine(**executor: object) -> Engine:
    memory = UniformAllocator(uniform_group(LAYERS, 16), 100)
    scheduler = Scheduler(SchedulerConfig(8, 64, 512, 100), memory)
    return Engine(scheduler, CostModelExecutor(COST, **executor), VirtualClock())  # type: ignore[arg-type]


def test_zero_load_takes_what_the_cost_says() -> None:
    e = engine()
    params = SamplingParams(max_tokens=3)
    last = list(e.run_trace([Arrival(1.0, "r", [5] * 100, params)]))[-1]
    prefill = COST.seconds(64, 64, 1) + COST.seconds(36, 100, 1)
    assert last.times is not None
    assert last.times.arrival == 1.0
    assert last.times.first_token == pytest.approx(1.0 + prefill)
    decode = COST.seconds(1, 101, 1) + COST.seconds(1, 102, 1)
    assert last.times.finished == pytest.approx(1.0 + prefill + decode)


def test_tokens_follow_the_rule() -> None:
    def rule(context: TokenContext) -> int:
        return context.seed + context.position

    e = engine(tokens=rule)
    out = list(e.run_trace([Arrival(0.0, "r", [5] * 10, SamplingParams(max_tokens=4), seed=100)]))
    assert [t for o in out for t in o.token_ids] == [110, 111, 112, 113]


def test_beams_need_a_rule() -> None:
    def beams(context: TokenContext, k: int) -> tuple[tuple[int, float], ...]:
        return tuple((token, -1.0 - token) for token in range(k))

    params = SamplingParams(max_tokens=3, temperature=0.0, beam=BeamParams(2), n=2)
    out = list(engine(beams=beams).run_trace([Arrival(0.0, "r", [5] * 10, params)]))
    assert [list(o.token_ids) for o in out] == [[0, 0, 0], [0, 0, 1]]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_fit_finds_the_line(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = LinearStepCost(*(float(x) for x in rng.uniform(0, 1, 4) * [1e-2, 1e-4, 1e-6, 1e-5]))
    rows = [
        (n, kv, r, true.seconds(n, kv, r))
        for n, kv, r in zip(
            rng.integers(1, 500, 30), rng.integers(1, 50_000, 30), rng.integers(1, 64, 30), strict=True
        )
    ]
    fitted = fit_linear(rows)
    for n, kv, r, seconds in rows:
        assert fitted.seconds(n, kv, r) == pytest.approx(seconds, rel=1e-4, abs=1e-9)


def test_a_fit_needs_rows() -> None:
    with pytest.raises(UsageError, match="at least 4"):
        fit_linear([(1, 1, 1, 0.1)])


def contiguous(slots: int, size: int) -> ContiguousAllocator:
    return ContiguousAllocator(uniform_group(LAYERS, 1), slots, lambda seq, prompt: size)


def test_a_reservation_wastes_what_is_not_used() -> None:
    a = contiguous(64, 20)
    a.begin("a", [1] * 5, 5)
    a.begin("b", [1] * 5, 5)
    assert a.waste() == {"tokens": 10, "reserved": 30, "rounding": 24, "outside": 0}
    with pytest.raises(OutOfPages):
        a.begin("c", [1] * 5, 5)
    a.end("a")
    a.begin("c", [1] * 5, 5)
    a.check()


def test_buddies_merge_again() -> None:
    rng = random.Random(1)
    sizes: dict[str, int] = {}
    a = ContiguousAllocator(uniform_group(LAYERS, 1), 100, lambda seq, prompt: sizes[seq])
    for step in range(3000):
        name = f"s{step}"
        sizes[name] = rng.randint(2, 40)
        try:
            a.begin(name, [1], 1)
        except OutOfPages:
            for victim in rng.sample(sorted(a._chunks), k=len(a._chunks) // 2 + 1):
                a.end(victim)
        a.check()
    for name in list(a._chunks):
        a.end(name)
    sizes["all"] = 64
    a.begin("all", [1], 1)


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
def test_the_same_trace_over_both_memories(kind: str) -> None:
    rng = random.Random(2)
    arrivals = [
        Arrival(i * 0.01, f"r{i}", [i] * rng.randint(1, 60), SamplingParams(max_tokens=rng.randint(1, 60)))
        for i in range(60)
    ]
    memory = UniformAllocator(uniform_group(LAYERS, 16), 32) if kind == "paged" else contiguous(512, 128)
    e = Engine(Scheduler(SchedulerConfig(32, 64, 128, 100), memory), CostModelExecutor(COST), VirtualClock())
    made = sum(len(o.token_ids) for o in e.run_trace(arrivals))
    assert made == sum(a.params.max_tokens or 0 for a in arrivals)
    e.scheduler.check()
    if kind == "contiguous":
        assert e.stats.preemptions == 0
