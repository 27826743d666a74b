"""Curves, least squares and the knapsack against brute force."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
import torch
from scipy.optimize import milp

from llmtool.errors import InfeasibleError
from llmtool.prune import curves, knapsack
from llmtool.prune.curves import curve
from llmtool.prune.knapsack import Choice, allocate, totals
from llmtool.prune.layerwise import Moments
from llmtool.prune.least_squares import refit, ridge
from llmtool.prune.units import Sublayer

MLP = Sublayer(1, 0, "mlp", 7, 1)


def inputs(seed: int, columns: int, tokens: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing


def least_squares_error(x: torch.Tensor, weight: torch.Tensor, g: torch.Tensor, units: list[int]) -> float:
    """Mean over tokens of e^T G e after the best refit on `units`, by lstsq."""
    y = x.double() @ weight.T.double()
    fitted = torch.linalg.lstsq(x[:, units].double(), y).solution if units else None
    error = y - x[:, units].double() @ fitted if fitted is not None else y
    return float(((error @ g.double()) * error).sum() / len(x))


@pytest.fixture(autouse=True)
def _no_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "DAMPING", 1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_those_of_least_squares(seed: int) -> None:
    x, generator = inputs(seed, 7), torch.Generator().manual_seed(seed + 50)
    weight, root = torch.randn(4, 7, generator=generator), torch.randn(4, 4, generator=generator)
    g = root @ root.T
    options = curve(MLP, x.T @ x / len(x), weight, g, range(7), 1)
    assert [len(o.units) for o in options] == [7, 6, 5, 4, 3, 2, 1, 0]
    for option in options:
        assert option.error == pytest.approx(
            least_squares_error(x, weight, g, list(option.units)), rel=1e-3, abs=1e-4
        )
    # The first unit to go is the best there is.
    best = min(least_squares_error(x, weight, g, [u for u in range(7) if u != gone]) for gone in range(7))
    assert options[1].error == pytest.approx(best, rel=1e-3, abs=1e-5)
    for option in options[2:5]:  # and no path is better than the best of all subsets
        exact = min(
            least_squares_error(x, weight, g, list(c))
            for c in itertools.combinations(range(7), len(option.units))
        )
        assert exact - 1e-4 <= option.error


def test_heads_go_whole_and_grouped_heads_keep_groups_alike() -> None:
    x, generator = inputs(4, 18), torch.Generator().manual_seed(9)
    weight = torch.randn(5, 18, generator=generator)
    gram = x.T @ x / len(x)
    heads = curve(Sublayer(0, 0, "attention", 6, 3), gram, weight, None, range(6), 1)
    assert [len(o.units) for o in heads] == [6, 5, 4, 3, 2, 1, 0]
    for option in heads:
        columns = [u * 3 + d for u in option.units for d in range(3)]
        assert option.error == pytest.approx(
            least_squares_error(x, weight, torch.eye(5), columns), rel=1e-3, abs=1e-3
        )
    grouped = curve(Sublayer(0, 0, "attention", 6, 3, group=3), gram, weight, None, range(6), 1)
    sizes = [(len(o.units), len({u // 3 for u in o.units})) for o in grouped]
    assert sorted(sizes) == sorted([(6, 2), (3, 1), (0, 0), (4, 2), (2, 1), (0, 0), (2, 2), (1, 1), (0, 0)])
    for option in grouped:
        counts = {sum(u // 3 == g for u in option.units) for g in {u // 3 for u in option.units}}
        assert len(counts) <= 1
        columns = [u * 3 + d for u in option.units for d in range(3)]
        assert option.error == pytest.approx(
            least_squares_error(x, weight, torch.eye(5), columns), rel=1e-3, abs=1e-3
        )


def test_widths_are_multiples_and_minima_hold() -> None:
    x = inputs(5, 7)
    options = curve(MLP, x.T @ x, torch.randn(2, 7), None, range(7), 3)
    assert [len(o.units) for o in options] == [7, 6, 3, 0]
    kept = curve(
        Sublayer(0, 0, "attention", 7, 1, min_units=1), x.T @ x, torch.randn(2, 7), None, range(7), 1
    )
    assert len(kept[-1].units) == 1


def test_planted_dependence_is_compensated_by_least_squares_and_not_by_scales() -> None:
    """Neuron 2 = 2 * neuron 0 - 3 * neuron 1: without it nothing is lost, if weights move; scales cannot do it."""
    x = inputs(6, 5)
    x[:, 2] = 2 * x[:, 0] - 3 * x[:, 1]
    weight, bias = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(4)
    y = x @ weight.T + bias
    fit, held_out = Moments.zeros(4, 4), Moments.zeros(4, 4)
    at = torch.tensor([0, 1, 3, 4])
    fit.add(x[:150, at], y[:150], torch.ones(150))
    held_out.add(x[150:, at], y[150:], torch.ones(50))
    found = refit(fit, held_out, weight[:, at], bias, ridges=(1e-9,))
    size = float(y.square().sum(1).mean())
    assert found.how == "ridge" and found.error < 1e-5 * size
    scales = refit(fit, held_out, weight[:, at], bias, ridges=())
    assert scales.error > 1e-3 * size
    # The surgeon sees it: each of the three is free to go, and no other unit is.
    first = curve(Sublayer(1, 0, "mlp", 5, 1), x.T @ x / len(x), weight, None, range(5), 1)[1]
    assert set(range(5)) - set(first.units) <= {0, 1, 2} and first.error < 1e-3 * size


def test_ridge_is_the_minimum_it_says() -> None:
    x, weight = inputs(7, 6), torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    y, bias = torch.randn(200, 3, generator=torch.Generator().manual_seed(3)), torch.randn(3)
    counts = torch.rand(200, generator=torch.Generator().manual_seed(4)) + 0.1
    moments = Moments.zeros(6, 3)
    moments.add(x, y, counts)
    new, shift = ridge(moments, weight, bias, 0.05)
    assert shift is not None
    w, b = new.double().requires_grad_(), shift.double().requires_grad_()
    c = counts.double()
    mean = (x.double() * c[:, None]).sum(0) / c.sum()
    pull = 0.05 * float(((x.double() - mean).square() * c[:, None]).sum(0).mean())
    loss = (c * (y.double() - x.double() @ w.T - b).square().sum(1)).sum() + pull * (
        w - weight
    ).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None and b.grad is not None
    assert float(w.grad.abs().max()) < 1e-2 * float(loss.detach()) / 100
    assert float(b.grad.abs().max()) < 1e-2
    assert moments.error(new, shift) * float(c.sum()) == pytest.approx(
        float((c * (y.double() - x.double() @ new.T.double() - shift.double()).square().sum(1)).sum()),
        rel=1e-4,
    )


def test_nothing_is_taken_that_errs_more_on_held_out_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    weight = torch.randn(3, 6, generator=generator)
    fit, held_out = Moments.zeros(6, 3), Moments.zeros(6, 3)
    fit.add(x, x @ weight.T + 5 * noise, torch.ones(8))
    other = torch.randn(100, 6, generator=generator)
    held_out.add(other, other @ weight.T, torch.ones(100))
    found = refit(fit, held_out, weight, None)
    assert found.how == "none" and torch.equal(found.weight, weight)


# -- the knapsack ------------------------------------------------------------------------------------------------


def problem(seed: int, kinds: tuple[str, ...]) -> list[list[Choice]]:
    rng = random.Random(seed)
    choices = []
    for _ in range(4):
        options, error = [], 0.0
        for k in range(5):
            options.append(Choice(error, {kind: (4 - k) * rng.uniform(0.5, 1.5) for kind in kinds}))
            error += rng.uniform(0.1, 2.0)
        choices.append(options)
    return choices


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kinds", [("flops",), ("flops", "kv"), ("flops", "params", "latency")])
def test_allocation_is_the_best_of_all(seed: int, kinds: tuple[str, ...]) -> None:
    choices = problem(seed, kinds)
    budgets = {k: 0.55 * sum(o[0].costs[k] for o in choices) for k in kinds}
    picked = allocate(choices, budgets)
    assert all(totals(choices, picked, k) <= budgets[k] for k in kinds)
    best = min(
        sum(o[j].error for o, j in zip(choices, combination, strict=True))
        for combination in itertools.product(range(5), repeat=4)
        if all(totals(choices, combination, k) <= budgets[k] for k in kinds)
    )
    assert sum(o[j].error for o, j in zip(choices, picked, strict=True)) == pytest.approx(best)


def test_a_huge_unit_does_not_break_a_small_budget() -> None:
    choices = [[Choice(0.0, {"flops": 100.0}), Choice(1e9, {"flops": 0.0})], problem(0, ("flops",))[0]]
    picked = allocate(choices, {"flops": 20.0})
    assert picked[0] == 1 and totals(choices, picked, "flops") <= 20.0


def test_no_choice_within_the_budget() -> None:
    with pytest.raises(InfeasibleError, match="least flops"):
        allocate([[Choice(0.0, {"flops": 5.0})]], {"flops": 4.0})


def test_the_solver_prints_nothing_to_stdout(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loud(*args: Any, **kwargs: Any) -> Any:
        os.write(1, b"a debug line of the solver")
        return milp(*args, **kwargs)

    monkeypatch.setattr(knapsack, "milp", loud)
    choices = problem(1, ("flops",))
    allocate(choices, {"flops": 0.5 * sum(o[0].costs["flops"] for o in choices)})
    out, err = capfd.readouterr()
    assert (out, err) == ("", "a debug line of the solver")
