"""Bounds are bounds, pruning loses nothing, and the space is what it says."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.errors import InfeasibleError
from llmtool.hardware import Cluster
from llmtool.hardware.prices import Price
from llmtool.plan import search as search_module
from llmtool.plan.bounds import bounds_of
from llmtool.plan.objective import OBJECTIVES, Objective
from llmtool.plan.search import SearchResult, search
from llmtool.plan.space import (
    SpaceOptions,
    balanced_layers,
    build_space,
    heuristic_plan,
    parallel_plans,
    smallest_cluster,
)
from llmtool.sim.deployment import Drafting
from llmtool.sim.ir import ModelIR
from llmtool.sim.memory import device_memory
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan, why_invalid
from llmtool.sim.simulate import simulate
from llmtool.sim.stepcost import PlanCost
from llmtool.sim.workload import Workload
from llmtool.workload.slo import SLO
from tests.plan.made import ENGINE, dense, device, load, mixture


def problem(seed: int, count: int = 12) -> tuple[ModelIR, Cluster, SpaceOptions, Workload, Objective]:
    """A random problem: model, cluster, limits, load and objective."""
    rng = random.Random(seed)
    ir = dense(4, 512) if rng.random() < 0.5 else mixture(2)
    spec = device(
        memory=rng.choice([60_000_000, 200_000_000, 4 * 10**9]),
        bandwidth=rng.choice([100e9, 400e9]),
        link=rng.choice([2e9, 50e9]),
        network=rng.choice([1e9, 5e9]),
        flops={"bf16": rng.choice([5e12, 50e12])},
    )
    devices = rng.choice([1, 2, 4, 6])
    cluster = Cluster(spec, devices, 6 if devices == 6 else 4)
    options = SpaceOptions(ENGINE, 100, budgets=(32, 128), max_seqs=(4, 16), fewer=rng.random() < 0.2)
    clients = rng.choice([None, None, 4, 12])
    rate = None if clients else rng.choice([5.0, 50.0, 500.0])
    workload = load(count, rate, seed, longest=40, clients=clients)
    slos = rng.choice(
        [(), (SLO("ttft", 200.0, 90.0), SLO("tpot", 20.0, 90.0)), (SLO("tpot", 8.0), SLO("ttft", 100.0))]
    )
    return ir, cluster, options, workload, Objective(rng.choice(OBJECTIVES), slos, Price(2.0, "made"))


@pytest.mark.parametrize("seed", range(12))
def test_bounds_are_below_every_simulation(seed: int) -> None:
    ir, cluster, options, workload, objective = problem(seed)
    ops = Ops(cluster.device, None)
    deployments = build_space(ir, cluster, options).feasible
    for d in random.Random(seed).sample(deployments, min(8, len(deployments))):
        cost = PlanCost(d, cluster, ops)
        bounds = bounds_of(cost, d, device_memory(d, cluster.device), workload)
        result = simulate(d, cluster, ops, workload, cost=cost)
        for i, record in enumerate(result.records):
            assert bounds.ttft[i] <= record.ttft and bounds.e2e[i] <= record.e2e
            assert record.tpot is None or bounds.tpot <= record.tpot
        assert bounds.duration <= result.duration
        least = objective.least_loss(bounds, d, workload, cluster.device.power)
        assert least <= objective.loss(result)
        if bounds.misses(objective.slos):
            assert not result.meets(objective.slos)


def find(seed: int, exhaustive: bool, count: int = 12) -> SearchResult | None:
    ir, cluster, options, workload, objective = problem(seed, count)
    space = build_space(ir, cluster, options)
    if not space.feasible:
        return None
    return search(space, cluster, None, workload, objective, exhaustive=exhaustive, processes=1)


@pytest.mark.parametrize("seed", range(60))
def test_the_pruned_winner_is_the_winner(seed: int) -> None:
    pruned, whole = find(seed, False), find(seed, True)
    assert (pruned is None) == (whole is None)
    if pruned is None or whole is None:
        return
    assert pruned.best.meets == whole.best.meets
    assert pruned.best.loss == pytest.approx(whole.best.loss, rel=1e-9)
    counts = pruned.counts()
    assert counts["enumerated"] == whole.counts()["enumerated"]
    assert sum(counts.values()) - counts["enumerated"] == counts["enumerated"]
    assert whole.counts()["bounded_out"] == whole.counts()["halved_out"] == 0
    assert counts["simulated"] <= whole.counts()["simulated"]


DRAFTINGS = (None, Drafting("2", 0.6), Drafting("auto", 0.9), Drafting("4", 0.3, 0.5))


@pytest.mark.parametrize("seed", range(200, 208))
def test_speculation_is_a_dimension_of_the_search(seed: int) -> None:
    """Bounds hold with drafts too, the pruned winner is the winner, and every plan is accounted for."""
    ir, cluster, options, workload, objective = problem(seed)
    space = build_space(ir, cluster, replace(options, draftings=DRAFTINGS))
    plain = build_space(ir, cluster, options)
    assert space.enumerated == len(DRAFTINGS) * plain.enumerated
    if not space.feasible:
        return
    assert all(d.plan.pp == 1 or d.drafting is None for d in space.feasible)
    ops = Ops(cluster.device, None)
    for d in random.Random(seed).sample(space.feasible, min(8, len(space.feasible))):
        bounds = bounds_of(PlanCost(d, cluster, ops), d, device_memory(d, cluster.device), workload)
        result = simulate(d, cluster, ops, workload)
        assert all(b <= r.ttft for b, r in zip(bounds.ttft, result.records, strict=True))
        assert all(b <= r.e2e for b, r in zip(bounds.e2e, result.records, strict=True))
        assert all(r.tpot is None or bounds.tpot <= r.tpot for r in result.records)
        assert bounds.duration <= result.duration
        assert sum(f.output_tokens for f in result.finished) == sum(r.output_len for r in workload.rows)
    found = [
        search(space, cluster, None, workload, objective, exhaustive=whole, processes=1)
        for whole in (False, True)
    ]
    assert found[0].best.loss == pytest.approx(found[1].best.loss, rel=1e-9)
    without = search(plain, cluster, None, workload, objective, processes=1)
    assert found[0].best.rank <= without.best.rank


@pytest.mark.parametrize("seed", range(100, 104))
def test_rounds_on_the_head_of_the_trace_keep_the_winner(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rounds, so that halving has its way: the winner is found, or one within the error of any prediction."""
    monkeypatch.setattr(search_module, "SMALLEST", 20)
    monkeypatch.setattr(search_module, "FULL", 4)
    pruned, whole = find(seed, False, 60), find(seed, True, 60)
    if pruned is None or whole is None:
        pytest.skip("this problem has no feasible plan")
    assert pruned.best.loss <= whole.best.loss * 1.02


def test_every_plan_is_accounted_for() -> None:
    ir, cluster, options, *_ = problem(3)
    space = build_space(ir, cluster, options)
    variants = len(options.budgets) * len(options.max_seqs)
    counts = [d for d in range(1, cluster.num_devices + 1) if cluster.num_devices % d == 0]
    plans = sum(
        len(list(parallel_plans(ir, n))) for n in (counts if options.fewer else [cluster.num_devices])
    )
    assert space.enumerated == plans * variants
    assert set(space.examples) == set(space.rejected)


@given(st.sampled_from([1, 2, 4, 6, 8]))
@settings(max_examples=10, deadline=None)
def test_all_plans_use_all_devices_once(devices: int) -> None:
    plans = list(parallel_plans(mixture(), devices))
    assert all(p.devices == devices for p in plans) and len(set(plans)) == len(plans)
    # Brute force over all degrees.
    degrees = range(1, devices + 1)
    wanted = {
        (tp, pp, dp, adp, ep)
        for tp in degrees
        for pp in degrees
        for dp in degrees
        for adp in degrees
        for ep in degrees
        if tp * pp * dp * adp == devices and (tp * adp) % ep == 0
    }
    assert {(p.tp, p.pp, p.dp, p.attention_dp, p.ep) for p in plans if not p.layers} == wanted


def test_the_head_counts_as_layers_when_stages_are_balanced() -> None:
    ir = dense(layers=24)  # its head is about 2.6 layers
    layers = balanced_layers(ir, 4)
    assert sum(layers) == 24 and layers[-1] < layers[0]
    assert not why_invalid(ParallelPlan(pp=4, layers=layers), ir)


def test_the_heuristic_fills_a_node_first() -> None:
    options = SpaceOptions(ENGINE, 400)
    plan = heuristic_plan(dense(), Cluster(device(), 8), options)
    assert plan is not None and plan.plan == ParallelPlan(tp=4, dp=2) and plan.budget == ENGINE.budget
    small = heuristic_plan(dense(), Cluster(device(memory=10**8), 8), options)
    assert small is None


def test_the_smallest_cluster_that_would_do() -> None:
    options = SpaceOptions(ENGINE, 400, budgets=(64,), max_seqs=(8,))
    tiny = Cluster(device(memory=150_000_000), 1)
    assert not build_space(dense(), tiny, options).feasible
    count = smallest_cluster(dense(), tiny, options)
    assert count is not None and count > 1
    assert build_space(dense(), Cluster(tiny.device, count, 1024), options).feasible
    assert not build_space(dense(), Cluster(tiny.device, count // 2, 1024), options).feasible
    with pytest.raises(InfeasibleError):
        search(build_space(dense(), tiny, options), tiny, None, load(5), Objective("latency"))


def test_processes_change_nothing() -> None:
    ir, cluster, options, workload, objective = problem(8, 120)
    space = build_space(ir, cluster, options)
    alone = search(space, cluster, None, workload, objective, processes=1)
    shared = search(space, cluster, None, workload, objective, processes=2)
    assert [(o.deployment, o.stage, o.loss) for o in alone.simulated[:3]] == [
        (o.deployment, o.stage, o.loss) for o in shared.simulated[:3]
    ]
