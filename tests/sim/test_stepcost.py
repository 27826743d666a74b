"""The cost of a plan's steps: known answers and laws that any cost must obey."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.hardware import Cluster, find_device
from llmtool.modelspec.catalogue import published
from llmtool.sim.collectives import Collectives, wire_seconds
from llmtool.sim.deployment import Deployment
from llmtool.sim.engines import find_engine
from llmtool.sim.ir import read_ir
from llmtool.sim.ops import COMPUTE_SHARE, LAUNCH, Ops, load_pack
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.stepcost import Batch, PlanCost
from tests.plan.made import deployment, device, load, mixture, run

PLANS = [
    ParallelPlan(),
    ParallelPlan(tp=2),
    ParallelPlan(pp=2),
    ParallelPlan(tp=2, attention_dp=2),
    ParallelPlan(tp=4),
]


def cost(plan: ParallelPlan, **facts: object) -> PlanCost:
    spec = device(**facts)
    return PlanCost(deployment(plan), Cluster(spec, plan.devices), Ops(spec, None))


def test_infinite_bandwidth_leaves_arithmetic_and_launches() -> None:
    """Closed form: with memory and links infinitely fast a step is its matrix products at the assumed share of
    peak, plus a launch for every kernel and the host."""
    spec = device(bandwidth=1e30, link=1e30)
    d = deployment(ParallelPlan())
    c = PlanCost(d, Cluster(spec, 1), Ops(spec, None))
    tokens = 64
    blocks = d.ir.active_parameters - d.ir.embedding_parameters
    products = 2.0 * tokens * blocks / (20e12 * COMPUTE_SHARE)
    # Per layer: norm, qkv, o, rotary; norm, gate and up, activation, down.
    assert c.stage_seconds(0, Batch(tokens, 0)) == pytest.approx(
        products + 8 * 8 * LAUNCH + 8 * LAUNCH, rel=5e-3
    )


@pytest.mark.parametrize("plan", PLANS, ids=str)
@given(st.integers(1, 300), st.integers(1, 4000), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_many_steps_at_once_cost_what_they_cost_one_by_one(
    plan: ParallelPlan, n: int, mean: int, steps: int
) -> None:
    c = cost(plan)
    at_once = c.decode_run(n, n * mean, steps)
    one_by_one = [c.seconds(Batch(n, n * mean + i * n, samples=n)) for i in range(steps)]
    assert at_once == pytest.approx(one_by_one, rel=1e-12)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_faster_hardware_is_never_slower(plan: ParallelPlan) -> None:
    batches = [
        Batch(1, 100, samples=1),
        Batch(64, 64_000, samples=64),
        Batch(8, 800, [(512, 0), (100, 300)], 10),
    ]
    for batch in batches:
        slow = cost(plan).seconds(batch)
        for faster in ({"bandwidth": 400e9}, {"link": 80e9}, {"flops": {"bf16": 40e12}}):
            assert cost(plan, **faster).seconds(batch) <= slow + 1e-12


def test_no_plan_beats_the_peak() -> None:
    spec = find_device("h100")
    config = published("llama-3.1-8b")
    assert config is not None
    for plan in (ParallelPlan(), ParallelPlan(tp=8)):
        d = Deployment(read_ir(config), plan, find_engine("vllm"), max_len=4096)
        c = PlanCost(d, Cluster(spec, plan.devices), Ops(spec, load_pack(spec)))
        for batch in (Batch(256, 256 * 4000, samples=256), Batch(chunks=[(4096, 0)] * 2, samples=2)):
            part = c.breakdown(batch)
            assert part.flops / part.seconds <= spec.peak("bf16")
            assert part.bytes / part.seconds <= spec.bandwidth * 1.05


def test_energy_is_power_times_time() -> None:
    result = run(deployment(ParallelPlan(tp=2)), load(20))
    mfu, mbu = result.utilization()
    assert 0 < mfu <= 1 and 0 < mbu <= 1
    assert result.joules() == pytest.approx(result.duration * 2 * 100.0 * (0.3 + 0.7 * max(mfu, mbu)))


def test_a_ring_sends_each_byte_twice_but_for_one_share() -> None:
    assert wire_seconds("all_reduce", 8e9, 8, 1e9) == pytest.approx(2 * 7)
    assert wire_seconds("all_gather", 8e9, 8, 1e9) == pytest.approx(7)
    spec = device()
    wires = Collectives(Cluster(spec, 16), Ops(spec, None))
    assert wires.cost("all_reduce", 1e6, 1).seconds == 0.0
    assert wires.cost("all_reduce", 1e8, 16).seconds > wires.cost("all_reduce", 1e8, 4).seconds
    # Two levels move only a node's share across the network, not the whole vector.
    assert wires.cost("all_reduce", 1e8, 16).seconds < wire_seconds("all_reduce", 1e8, 16, spec.network)
    for op in ("all_gather", "reduce_scatter", "all_to_all"):
        sizes = [wires.cost(op, size, 8).seconds for size in (1e3, 1e6, 1e9)]
        assert sizes == sorted(sizes)


def test_experts_are_read_when_visited() -> None:
    spec = device()
    ops = Ops(spec, None)
    one = ops.moe(1, 512, 1024, 8, 8, 2, "bf16")
    assert one.bytes == pytest.approx(2 * 3 * 512 * 1024 * 2, rel=0.01)  # the two chosen ones
    many = ops.moe(1000, 512, 1024, 8, 8, 2, "bf16")
    assert many.bytes >= 8 * 3 * 512 * 1024 * 2
    assert many.flops == 1000 * one.flops


def test_expert_parallelism_reads_less_and_sends_more() -> None:
    spec = device()
    wide = PlanCost(deployment(ParallelPlan(tp=4), mixture()), Cluster(spec, 4), Ops(spec, None))
    split = PlanCost(deployment(ParallelPlan(tp=4, ep=4), mixture()), Cluster(spec, 4), Ops(spec, None))
    assert split.linear(0, 4).bytes <= wide.linear(0, 4).bytes * 1.5
    spread = PlanCost(
        deployment(ParallelPlan(attention_dp=4, ep=4), mixture()), Cluster(spec, 4), Ops(spec, None)
    )
    assert spread.linear(0, 64).network > 0


def test_factors_move_the_ridge_of_a_roofline() -> None:
    """Slower memory can make a step memory-bound that was bound by compute: with any factors more tokens take no
    less time than fewer."""
    spec = device()
    base = ParallelPlan()
    for compute, memory in ((1.0, 1.0), (0.1, 1.0), (1.0, 0.1), (0.2, 3.0)):
        d = deployment(base)
        d = replace(d, engine=replace(d.engine, compute=compute, memory=memory))
        cost = PlanCost(d, Cluster(spec, 1), Ops(spec, None))
        linear = cost._linear[0]
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(linear))
        work = Ops(spec, None).gemm(256, 1024, 1024, "bf16")
        seen = work.under(compute, memory)
        legs = {work.bound: work.seconds, ("memory" if work.bound == "compute" else "compute"): work.slack}
        factors = {"compute": compute, "memory": memory}
        assert seen.seconds * factors[seen.bound] == max(legs[k] * factors[k] for k in legs)
