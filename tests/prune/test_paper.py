"""The seed against brute force: search by MACs and by latency, rearrangement, mask tuning."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmtool.errors import InfeasibleError
from llmtool.prune.layerwise import Moments
from llmtool.prune.paper import (
    Line,
    fisher_of_batches,
    fit_line,
    head_system,
    neuron_system,
    rearrange,
    search_latency,
    search_macs,
    solve_scales,
)

Floats = NDArray[Any]
LAYERS, HEADS, NEURONS = 2, 4, 8


def fishers(seed: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    return rng.random((LAYERS, HEADS)), rng.random((LAYERS, NEURONS)) / 3


def best_by_brute_force(
    heads: Floats, neurons: Floats, cost: Any, budget: float, least: tuple[int, int] = (0, 0)
) -> float:
    """The most importance over all 2^24 masks within the budget: of equally many units, the best are best."""
    best = -1.0
    ordered_h = [np.sort(row)[::-1].cumsum() for row in heads]
    ordered_n = [np.sort(row)[::-1].cumsum() for row in neurons]
    for counts in itertools.product(
        *[range(least[0], HEADS + 1)] * LAYERS, *[range(least[1], NEURONS + 1)] * LAYERS
    ):
        h, n = counts[:LAYERS], counts[LAYERS:]
        if sum(h) >= 1 and cost(h, n) <= budget * (1 + 1e-12):
            value = sum(o[c - 1] for o, c in zip(ordered_h, h, strict=True) if c)
            best = max(best, value + sum(o[c - 1] for o, c in zip(ordered_n, n, strict=True) if c))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.2, 0.4, 0.7, 0.95])
def test_search_by_macs_is_optimal(seed: int, share: float) -> None:
    heads, neurons = fishers(seed)
    head_cost, neuron_cost = 5.0, 2.0
    budget = share * (heads.size * head_cost + neurons.size * neuron_cost)

    def cost(h: Any, n: Any) -> float:
        return float(sum(h) * head_cost + sum(n) * neuron_cost)

    head_mask, neuron_mask = search_macs(heads, neurons, head_cost, neuron_cost, budget)
    assert cost(head_mask.sum(1), neuron_mask.sum(1)) <= budget
    value = heads[head_mask].sum() + neurons[neuron_mask].sum()
    assert value == pytest.approx(best_by_brute_force(heads, neurons, cost, budget))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.45, 0.7, 0.9])
def test_search_by_latency_is_optimal_for_a_step_shaped_table(seed: int, share: float) -> None:
    """Flat up to 2 heads and 3 neurons, then rising: every layer gets its free units."""
    heads, neurons = fishers(seed)
    head_line, neuron_line = Line(3.0, 2, 2.0), Line(2.0, 3, 0.5)

    def cost(h: Any, n: Any) -> float:
        return sum(head_line.seconds(x) for x in h) + sum(neuron_line.seconds(x) for x in n)

    budget = share * cost([HEADS] * LAYERS, [NEURONS] * LAYERS)
    head_mask, neuron_mask = search_latency(heads, neurons, head_line, neuron_line, budget)
    assert cost(head_mask.sum(1), neuron_mask.sum(1)) <= budget + 1e-12
    assert head_mask.sum(1).min() >= 2 and neuron_mask.sum(1).min() >= 3
    value = heads[head_mask].sum() + neurons[neuron_mask].sum()
    assert value == pytest.approx(best_by_brute_force(heads, neurons, cost, budget, (1, 1)))


def test_one_huge_head_stays_within_the_budget() -> None:
    heads, neurons = fishers(0)
    heads[1, 2] = 1e6
    with pytest.raises(InfeasibleError):
        search_macs(heads, neurons, 100.0, 1.0, 60.0)
    head_mask, neuron_mask = search_macs(heads, neurons, 100.0, 1.0, 0.2 * (800 + 16))
    assert 100 * head_mask.sum() + neuron_mask.sum() <= 0.2 * 816
    assert head_mask[1, 2]


def test_a_line_is_found_again() -> None:
    line = Line(3.0, 5, 0.25)
    found = fit_line([line.seconds(n) for n in range(1, 13)])
    assert found.threshold == 5
    assert (found.floor, found.slope) == pytest.approx((3.0, 0.25))
    assert fit_line([2.0] * 4).slope == 0.0


def test_fisher_of_batches_squares_the_mean() -> None:
    gradients = torch.tensor([[1.0, 2.0], [-1.0, 4.0], [3.0, 0.0]])
    assert fisher_of_batches(gradients, 2).tolist() == [0.0 + 9.0, 9.0 + 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_rearrangement_is_the_greedy_pass_and_never_worse(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    fisher = gradients.square().sum(0)
    mask = torch.zeros(7, dtype=torch.bool)
    mask[fisher.argsort(descending=True)[:4]] = True
    kept = rearrange(gradients, mask)

    def harm(m: torch.Tensor) -> float:
        return float(gradients[:, ~m].sum(1).square().sum())

    # The pass, written out.
    order = fisher.argsort().tolist()
    pruned = order[:3]
    for unit in order[3:]:
        candidates = [[u for u in [*pruned, unit] if u != out] for out in [*pruned, unit]]
        pruned = min(candidates, key=lambda c: float(gradients[:, c].sum(1).square().sum()))
    assert sorted((~kept).nonzero().flatten().tolist()) == sorted(pruned)
    assert harm(kept) <= harm(mask) + 1e-12
    best = min(
        float(gradients[:, list(c)].sum(1).square().sum()) for c in itertools.combinations(range(7), 3)
    )
    assert best <= harm(kept) + 1e-12


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    found = Moments.zeros(x.shape[1], y.shape[1])
    found.add(x, y, torch.ones(len(x)))
    return found


def test_systems_of_scales_are_those_of_the_written_out_problem() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(50, 6, generator=generator), torch.randn(5, 6, generator=generator)
    y, bias = torch.randn(50, 5, generator=generator), torch.randn(5, generator=generator)
    target = (y - bias).flatten().double()
    moments = moments_of(x, y)
    per_neuron = torch.stack([(x[:, [j]] * weight[:, j]).flatten() for j in range(6)], 1).double()
    normal, right = neuron_system(moments, weight, bias)
    torch.testing.assert_close(normal, per_neuron.T @ per_neuron, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, per_neuron.T @ target, rtol=1e-4, atol=1e-4)
    per_head = torch.stack(
        [(x[:, 2 * h : 2 * h + 2] @ weight[:, 2 * h : 2 * h + 2].T).flatten() for h in range(3)], 1
    )
    per_head = torch.cat((per_head, torch.ones(len(per_head), 1)), 1).double()
    normal, right = head_system(moments, weight, bias, 2)
    torch.testing.assert_close(normal, per_head.T @ per_head, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, per_head.T @ target, rtol=1e-4, atol=1e-4)


def test_tuning_ends_where_a_scale_leaves_the_range() -> None:
    normal = torch.eye(3, dtype=torch.float64) * 100
    good = solve_scales(normal, torch.tensor([150.0, 90.0, 100.0], dtype=torch.float64), 3)
    assert good is not None
    # Damping 1 on the normal equations: (N^2 + 1) d = N (r - N 1).
    expected = 1 + 100 * (torch.tensor([150.0, 90.0, 100.0]) - 100) / (100**2 + 1)
    torch.testing.assert_close(good.float(), expected.float(), atol=1e-6, rtol=1e-6)
    assert solve_scales(normal, torch.tensor([5000.0, 90.0, 100.0], dtype=torch.float64), 3) is None
