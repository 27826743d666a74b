"""Speculation on a simulated device: the same controllers, and answers that must hold whatever the device."""

from __future__ import annotations

import statistics

import pytest

from llmtool.errors import InfeasibleError, UsageError
from llmtool.hardware import Cluster
from llmtool.hardware.device import find_device
from llmtool.sim.memory import device_memory
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.replica import TOKEN, SimRequest
from llmtool.sim.speculation import SpecRun, SyntheticProposer, simulate_speculation
from llmtool.sim.stepcost import PlanCost
from tests.plan.made import deployment


def run(spec: str, acceptance: float, count: int = 12, gap: float = 0.5, coverage: float = 1.0) -> SpecRun:
    device, d = find_device("h100"), deployment(ParallelPlan(), max_len=400)
    cost = PlanCost(d, Cluster(device, 1), Ops(device, None))
    requests = [SimRequest(str(i), gap * i, [TOKEN] * 100, 150) for i in range(count)]
    return simulate_speculation(
        cost, device_memory(d, device), requests, spec, SyntheticProposer(acceptance, coverage)
    )


def latency(result: SpecRun) -> float:
    assert all(r.success and r.output_tokens == 150 for r in result.records)
    return statistics.mean(r.e2e for r in result.records)


def test_right_drafts_pay_and_wrong_ones_cost_nothing() -> None:
    off = latency(run("off", 0.7))
    assert latency(run("3", 0.9)) < 0.6 * off and latency(run("auto", 0.9)) < 0.6 * off
    assert latency(run("auto", 0.0)) <= 1.02 * off
    assert latency(run("auto", 0.9, coverage=0.0)) == pytest.approx(off)
    spec = run("3", 1.0).spec
    assert spec is not None and spec.accepted_tokens == spec.draft_tokens > 0
    assert run("off", 0.7).spec is None


def test_auto_is_as_good_as_the_best_length() -> None:
    for acceptance in (0.4, 0.8):
        fixed = min(latency(run(k, acceptance, count=30, gap=0.2)) for k in ("off", "1", "3", "5", "8"))
        assert latency(run("auto", acceptance, count=30, gap=0.2)) <= 1.05 * fixed


def test_times_are_those_of_outputs() -> None:
    for record in run("auto", 0.8, count=3).records:
        assert record.ttft + sum(record.itls) == pytest.approx(record.e2e)


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(UsageError, match="acceptance"):
        SyntheticProposer(1.5)
    device, d = find_device("h100"), deployment(ParallelPlan(), max_len=10**8)
    cost = PlanCost(d, Cluster(device, 1), Ops(device, None))
    with pytest.raises(InfeasibleError, match="longest request"):
        simulate_speculation(cost, device_memory(d, device), [], "auto", SyntheticProposer(0.5))
