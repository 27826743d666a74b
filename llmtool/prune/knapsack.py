"""Which size each sublayer gets: a multiple-choice knapsack with one or more budgets, solved exactly by HiGHS."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from llmtool.errors import InfeasibleError

GAP = 1e-6
SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One size of a sublayer: what it costs the loss, and how much of every budget it takes."""

    error: float
    costs: Mapping[str, float]


def allocate(choices: Sequence[Sequence[Choice]], budgets: Mapping[str, float]) -> list[int]:
    """One choice per sublayer with the least error in total, within every budget. Never exceeds one.

    What is left of the budgets afterwards goes to the sublayers that gain most from it. Deterministic.
    Raises InfeasibleError when even the cheapest choices exceed a budget.
    """
    scales = {kind: max(b, 1e-30) for kind, b in budgets.items()}
    for kind, budget in budgets.items():
        least = sum(min(c.costs[kind] for c in options) for options in choices)
        if least > budget * (1 + 1e-12):
            raise InfeasibleError(f"The least {kind} is {least:.6g}, and the budget is {budget:.6g}.")
    rows, columns, values, errors, base = [], [], [], [], 0
    for i, options in enumerate(choices):
        for j, choice in enumerate(options):
            rows.append(i)
            columns.append(base + j)
            values.append(1.0)
            errors.append(choice.error)
            for k, kind in enumerate(budgets):
                rows.append(len(choices) + k)
                columns.append(base + j)
                values.append(choice.costs[kind] / scales[kind])
        base += len(options)
    matrix = coo_array((values, (rows, columns)), shape=(len(choices) + len(budgets), base)).tocsr()
    low = np.concatenate((np.ones(len(choices)), np.full(len(budgets), -np.inf)))
    # A hair below the budget: the solver's own tolerance must not spend more than there is.
    high = np.concatenate((np.ones(len(choices)), np.full(len(budgets), 1.0 - 1e-7)))
    largest = max(max(errors), 1e-30)
    with _stdout_as_stderr():
        solution = milp(
            np.array(errors) / largest,
            constraints=LinearConstraint(matrix, low, high),
            integrality=np.ones(base),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
    if solution.x is None:
        picked = [min(range(len(options)), key=lambda j: _load(options[j], scales)) for options in choices]
    else:
        picked, base = [], 0
        for options in choices:
            picked.append(int(np.argmax(solution.x[base : base + len(options)])))
            base += len(options)
    return _fill(choices, budgets, _repair(choices, budgets, scales, picked))


@contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """HiGHS prints debug lines past Python, straight to file descriptor 1, where a JSON document may be due."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def totals(choices: Sequence[Sequence[Choice]], picked: Sequence[int], kind: str) -> float:
    return sum(options[j].costs[kind] for options, j in zip(choices, picked, strict=True))


def _load(choice: Choice, scales: Mapping[str, float]) -> float:
    return max((choice.costs[kind] / scale for kind, scale in scales.items()), default=0.0)


def _within(choices: Sequence[Sequence[Choice]], budgets: Mapping[str, float], picked: Sequence[int]) -> bool:
    return all(totals(choices, picked, kind) <= budget for kind, budget in budgets.items())


def _repair(
    choices: Sequence[Sequence[Choice]],
    budgets: Mapping[str, float],
    scales: Mapping[str, float],
    picked: list[int],
) -> list[int]:
    """Steps to cheaper choices, the least harmful per saving first, until every budget holds."""
    while not _within(choices, budgets, picked):
        over = {k: s for k, s in scales.items() if totals(choices, picked, k) > budgets[k]}
        best: tuple[float, int, int] | None = None
        for i, options in enumerate(choices):
            now = options[picked[i]]
            for j, choice in enumerate(options):
                saved = sum(max(0.0, (now.costs[k] - choice.costs[k]) / s) for k, s in over.items())
                worse = any(choice.costs[k] > now.costs[k] for k in over)
                if saved > 0 and not worse:
                    rate = (choice.error - now.error) / saved
                    best = min(best, (rate, i, j)) if best else (rate, i, j)
        if best is None:
            raise InfeasibleError("No choice of sizes holds all budgets at once.")
        picked[best[1]] = best[2]
    return picked


def _fill(choices: Sequence[Sequence[Choice]], budgets: Mapping[str, float], picked: list[int]) -> list[int]:
    """Steps to better choices while one fits: the largest gain first."""
    spent = {kind: totals(choices, picked, kind) for kind in budgets}
    while True:
        best: tuple[float, int, int] | None = None
        for i, options in enumerate(choices):
            now = options[picked[i]]
            for j, choice in enumerate(options):
                fits = all(spent[k] + choice.costs[k] - now.costs[k] <= budgets[k] for k in budgets)
                if choice.error < now.error and fits:
                    gain = (choice.error - now.error, i, j)
                    best = min(best, gain) if best else gain
        if best is None:
            return picked
        _, i, j = best
        for kind in budgets:
            spent[kind] += choices[i][j].costs[kind] - choices[i][picked[i]].costs[kind]
        picked[i] = j
