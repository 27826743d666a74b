"""What controllers learn: acceptance by class and position, and the cost of a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls

from llmtool.core.speculation.acceptance import CLASSES, AcceptanceTable, match_class
from llmtool.core.speculation.cost import PATIENCE, REFIT, LearnedStepCost, nnls
from llmtool.core.speculation.draft import MAX_DEPTH, StepRecord, StepView
from llmtool.errors import UsageError
from tests.core.speculation.world import affine, knee


def record(match: int, k: int, right: int, limit: int = 8, copies: int = 1, source: int = 0) -> StepRecord:
    """Sequences whose drafts are right for `right` tokens, of which k are verified."""
    ones = np.ones(copies, np.int64)
    emitted = min(k, right) + 1
    view = StepView(match * ones, limit * ones, source * ones, 10)
    return StepRecord(view, k * ones, emitted * ones, min(right, emitted) * ones, 0.01)


def test_classes() -> None:
    lengths = np.array([0, 2, 3, 4, 5, 6, 9, 10, 17, 18, 32])
    assert match_class(lengths).tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_draft_that_was_right_throughout_is_censored_not_failed() -> None:
    table = AcceptanceTable()
    for _ in range(200):
        table.record(record(5, k=3, right=3, limit=3))
    row = int(table.rows(np.array([0]), np.array([5]))[0])
    survival = table.survival()[row]
    assert survival[2] > 0.93
    assert table._counts[0][row, 3:].sum() == 0, "nothing is known past what was seen"


def test_drafts_are_scored_without_being_verified_and_one_past_it() -> None:
    table = AcceptanceTable()
    table.record(record(5, k=0, right=8))
    row = int(table.rows(np.array([0]), np.array([5]))[0])
    assert table._counts[0][row].tolist() == [1, *[0] * (MAX_DEPTH - 1)] and table._counts[1][row, 0] == 1
    table = AcceptanceTable()
    table.record(record(5, k=2, right=2))
    row = int(table.rows(np.array([0]), np.array([5]))[0])
    assert table._counts[0][row, :4].tolist() == [1, 1, 1, 0], "the bonus token differs from the third"
    assert table._counts[1][row, :4].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("copies", [1, 7])
def test_hazards_are_learned_by_class_and_position(copies: int) -> None:
    rng = np.random.default_rng(0)
    hazards = {2: [0.4, 0.7, 0.9], 20: [0.95, 0.8, 0.6]}
    table = AcceptanceTable()
    for _ in range(3000 // copies):
        for match, chances in hazards.items():
            for _ in range(copies):
                right = next((j for j, p in enumerate(chances) if rng.random() >= p), 3)
                table.record(record(match, k=3, right=right, limit=3, source=match % 2))
    for match, chances in hazards.items():
        row = int(table.rows(np.array([0]), np.array([match]))[0])
        assert np.abs(table.survival()[row, :3] - np.cumprod(chances)).max() < 0.16
        # 100 observations that decay: a standard deviation of 0.04 and less, and a prior of weight 4


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8), st.integers(0, 8), st.integers(1, 3))))
@settings(max_examples=60, deadline=None)
def test_survival_is_a_chance_and_never_rises(log: list[tuple[int, int, int, int]]) -> None:
    table = AcceptanceTable()
    for match, k, right, copies in log:
        table.record(record(match, k, right, copies=copies))
    table.rows(np.array([1]), np.array([0]))
    survival = table.survival()
    assert survival.shape == (2 * CLASSES, MAX_DEPTH)
    assert (survival > 0).all() and (survival <= 1).all() and (np.diff(survival, axis=1) <= 0).all()


def test_many_at_once_say_the_same_as_one_by_one() -> None:
    one, many = AcceptanceTable(), AcceptanceTable()
    for _ in range(50):
        one.record(record(5, k=2, right=1))
    many.record(record(5, k=2, right=1, copies=50))
    row = int(one.rows(np.array([0]), np.array([5]))[0])
    ratio = one._counts[1][row, :2] / one._counts[0][row, :2]
    assert ratio == pytest.approx(many._counts[1][row, :2] / many._counts[0][row, :2])
    assert many._counts[0][row, 0] == 50, "one step's observations do not decay one another"


def test_a_broken_table_is_refused() -> None:
    with pytest.raises(UsageError, match="rows"):
        AcceptanceTable().load_state_dict({"hits": [[0.0] * MAX_DEPTH], "tries": [[0.0] * MAX_DEPTH]})


# -- step cost ---------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 7), st.booleans())
@settings(max_examples=200, deadline=None)
def test_nnls_equals_scipys(seed: int, size: int, warm: bool) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(size + 4, size))
    b = rng.normal(size=size + 4)
    start = rng.random(size) < 0.5 if warm else None
    ours = nnls(a.T @ a, a.T @ b, start)
    theirs, _ = scipy_nnls(a, b)
    assert (ours >= 0).all()
    assert np.linalg.norm(a @ ours - b) == pytest.approx(np.linalg.norm(a @ theirs - b), abs=1e-7)


def feed(cost: LearnedStepCost, true: object, steps: int, seed: int = 0, noise: float = 0.03) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        n, kv, depth = int(2 ** rng.uniform(0, 9)), int(rng.uniform(0, 2e5)), int(rng.integers(0, 4))
        cost.record(n, kv, depth, true(n, kv, depth) * float(np.exp(noise * rng.normal())))  # type: ignore[operator]


@pytest.mark.parametrize("true", [affine, knee])
def test_costs_are_learned(true: object) -> None:
    cost = LearnedStepCost()
    feed(cost, true, 600)
    for n in (1, 4, 32, 100, 400):
        for kv in (100, 100_000):
            assert cost.seconds(n, kv, 1) == pytest.approx(true(n, kv, 1), rel=0.06)  # type: ignore[operator]
            assert cost.seconds(n, kv, 1) == pytest.approx(float(cost.curve(np.array([n]), kv, 1)[0]))
    assert min(cost.coefficients) >= 0


def test_padding_is_part_of_the_cost() -> None:
    cost = LearnedStepCost((4, 8, 64))
    feed(cost, affine, 100)
    assert cost.padded(np.array([1, 4, 5, 64, 65])).tolist() == [4, 4, 8, 64, 65]
    assert cost.seconds(5, 10) == cost.seconds(8, 10) < cost.seconds(9, 10) == cost.seconds(64, 10)


def test_an_outlier_is_clipped_and_nonsense_ignored() -> None:
    cost = LearnedStepCost()
    for i in range(64):
        cost.record(4, 100, 0, 100.0 if i == 40 else 0.01)
    cost.record(4, 100, 0, 0.0)
    cost.record(4, 100, 0, float("nan"))
    assert cost.seconds(4, 100) == pytest.approx(0.01, rel=0.1)


def test_a_device_that_has_changed_is_learned_anew() -> None:
    cost = LearnedStepCost()
    for _ in range(500):
        cost.record(4, 100, 0, 0.01)
    for _ in range(PATIENCE + 2 * REFIT):
        cost.record(4, 100, 0, 0.05)
    assert cost.resets == 1
    assert cost.seconds(4, 100) == pytest.approx(0.05, rel=0.02)


def test_costs_survive_a_restart() -> None:
    cost, again = LearnedStepCost(), LearnedStepCost()
    feed(cost, affine, 104)
    again.load_state_dict(cost.state_dict())
    assert again.seconds(30, 5000, 2) == pytest.approx(cost.seconds(30, 5000, 2), rel=1e-3)
    with pytest.raises(UsageError, match="cell"):
        again.load_state_dict({"cells": [[1, 2, 3]], "steps": 1})
