"""Controllers on a made-up device: against brute force, when the world turns, for very long, and against drafters
that mean no good."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.controllers import (
    Controller,
    FixedController,
    SmartSpecController,
    TableController,
)
from llmtool.core.speculation.cost import LearnedStepCost
from llmtool.core.speculation.draft import StepRecord, StepView
from llmtool.errors import UsageError
from tests.core.speculation.world import SHAPES, Cost, World, affine, knee, staircase, steep

COSTS = {"affine": affine, "steep": steep, "knee": knee, "staircase": staircase}
MIXES = {
    "one": [(1, 20, 0.9)],
    "one, poor": [(1, 2, 0.3)],
    "few": [(2, 2, 0.45), (2, 20, 0.9)],
    "many": [(16, 2, 0.4), (16, 7, 0.7), (16, 20, 0.92)],
    "crowd": [(64, 3, 0.5), (64, 20, 0.85)],
}


def auto(cost: Cost) -> AutoController:
    return AutoController(LearnedStepCost(SHAPES if cost is staircase else ()))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("mix", MIXES)
def test_auto_is_within_2_percent_of_brute_force_after_300_steps(cost: str, mix: str) -> None:
    world = World(COSTS[cost], MIXES[mix], noise=0.02)
    controller = auto(COSTS[cost])
    world.run(controller, 300)
    world.run(controller, 200)
    assert world.chosen(200) >= 0.98 * world.best(), (controller.explain(), world.lengths[-1])


@pytest.mark.parametrize(("batch", "chance"), [(1, 0.8), (32, 0.8), (32, 0.3), (32, 0.1)])
def test_auto_finds_the_depth_of_a_model_drafter(chance: float, batch: int) -> None:
    world = World(affine, [(batch, 0, chance)], modelled=True)
    controller = AutoController()
    world.run(controller, 500)
    assert world.chosen(200) >= 0.98 * world.best(), (controller.explain(), world.lengths[-1])


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_auto_recovers_when_drafts_turn_good_while_it_is_off(cost: str, batch: int) -> None:
    controller = auto(COSTS[cost])
    World(COSTS[cost], [(batch, 5, 0.0)]).run(controller, 600)
    good = World(COSTS[cost], [(batch, 5, 0.95)], seed=1)
    good.run(controller, 250)
    assert good.chosen(50) >= 0.98 * good.best(), (controller.explain(), good.lengths[-1])


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("batch", [1, 4, 32, 128])
@pytest.mark.parametrize("match", [2, 30])
def test_a_drafter_that_is_always_wrong_costs_at_most_2_percent(cost: str, batch: int, match: int) -> None:
    world = World(COSTS[cost], [(batch, match, 0.0)])
    realised = world.run(auto(COSTS[cost]), 1000)
    assert realised >= world.goodput([0] * batch) / 1.02


@pytest.mark.parametrize("cost", COSTS)
def test_a_drafter_that_is_always_right_is_followed_as_far_as_it_pays(cost: str) -> None:
    world = World(COSTS[cost], [(4, 6, 1.0)])
    controller = auto(COSTS[cost])
    world.run(controller, 300)
    assert world.chosen(50) >= 0.98 * world.best()


def test_a_drafter_that_is_good_until_it_is_verified_is_given_up() -> None:
    """What shadow scoring and the table say is a lie here; only the watchdog sees what is realised."""

    class Liar(World):
        def step(self, controller: Controller, prefill_tokens: int = 0) -> None:
            view = self.view()
            lengths = controller.plan(view)
            right = np.where(lengths > 0, 0, self.limit)
            emitted = np.ones(view.batch, np.int64)
            seconds = self.true_seconds(lengths)
            controller.record(StepRecord(view, lengths, emitted, np.minimum(right, emitted), seconds))
            self.tokens += view.batch
            self.seconds += seconds
            self.lengths.append(lengths.tolist())

    world = Liar(steep, [(4, 5, 0.0)])
    controller = AutoController()
    realised = world.run(controller, 4000)
    assert controller.trips > 0
    assert realised >= world.goodput([0] * 4) / 1.05


def test_50k_steps_at_batch_1_do_not_wind_up() -> None:
    """Recursive least squares forgets the cost of tokens here, as every step is alike, and then speculates wildly
    or never."""
    controller = AutoController()
    loaded = World(steep, [(32, 20, 0.9)], noise=0.05)
    loaded.run(controller, 300)
    before = controller.cost.seconds(160, 1000)
    lonely = World(steep, [(1, 2, 0.1)], noise=0.05, seed=1)
    realised = lonely.run(controller, 50_000)
    assert realised >= lonely.goodput([0]) / 1.02
    assert np.isfinite(controller.cost.coefficients).all()
    assert controller.cost.seconds(160, 1000) == pytest.approx(before, rel=0.1)
    loaded = World(steep, [(32, 20, 0.9)], noise=0.05, seed=2)
    loaded.run(controller, 50)
    assert loaded.chosen(50) >= 0.98 * loaded.best()


def test_prompt_chunks_do_not_move_the_choice() -> None:
    """Their seconds must be spent anyway: counting them lowers goodput and lets worthless drafts in."""
    controller = AutoController()
    world = World(steep, [(8, 3, 0.45)])
    for i in range(400):
        world.step(controller, prefill_tokens=64 * (i % 2))
    assert world.chosen(100) >= 0.98 * world.best()


@pytest.mark.parametrize("make", [AutoController, SmartSpecController, lambda: FixedController(3)])
def test_the_same_log_gives_the_same_decisions_also_after_a_restart(make: object) -> None:
    runs = []
    for _ in range(2):
        world = World(affine, MIXES["few"], noise=0.1)
        controller: Controller = make()  # type: ignore[operator]
        world.run(controller, 200)
        runs.append(world.lengths)
    assert runs[0] == runs[1]
    state = json.loads(json.dumps(controller.state_dict()))
    again: Controller = make()  # type: ignore[operator]
    again.load_state_dict(state)
    assert json.loads(json.dumps(again.state_dict())) == state
    json.dumps(again.explain() | controller.explain())
    with pytest.raises(UsageError, match="saved state"):
        TableController({1: 1}).load_state_dict(state)


def test_a_warm_start_chooses_well_at_once() -> None:
    cold = AutoController()
    World(steep, MIXES["few"]).run(cold, 400)
    warm = AutoController()
    warm.load_state_dict(cold.state_dict())
    world = World(steep, MIXES["few"], seed=3)
    world.run(warm, 20)
    assert world.chosen(20) >= 0.98 * world.best()


def test_nothing_to_draft_and_nobody_to_draft_for() -> None:
    for limits in ([], [0, 0]):
        none = np.array(limits, np.int64)
        view = StepView(none, none, none, 0)
        for controller in (
            AutoController(),
            SmartSpecController(),
            FixedController(4),
            TableController({1: 2}),
        ):
            for _ in range(20):
                lengths = controller.plan(view)
                assert lengths.tolist() == limits
                controller.record(StepRecord(view, lengths, none + 1, none, 0.01))


def test_fixed_and_table_choose_what_they_are_told() -> None:
    view = StepView(np.array([2, 2, 2]), np.array([5, 2, 0]), np.zeros(3, np.int64), 10)
    assert FixedController(3).plan(view).tolist() == [3, 2, 0]
    assert FixedController(0).plan(view).tolist() == [0, 0, 0] and FixedController(0).name == "off"
    assert TableController({1: 5, 3: 1, 8: 0}).plan(view).tolist() == [1, 1, 0]
    assert TableController({4: 5}).plan(view).tolist() == [0, 0, 0]
    for bad in (17, -1):
        with pytest.raises(UsageError, match=f"not {bad}"):
            FixedController(bad)
        with pytest.raises(UsageError, match=f"k = {bad}"):
            TableController({1: bad})
    with pytest.raises(UsageError, match="empty"):
        TableController({})


def test_smartspec_follows_its_formula() -> None:
    """One k for all, the argmax of sum (1 - a^(k+1)) / (1 - a) over the line, by trying all."""
    controller = SmartSpecController()
    World(steep, [(4, 5, 0.8)]).run(controller, 300)
    view = World(steep, [(4, 5, 0.8)]).view()
    a, cost = controller.acceptance, controller.cost
    rates = [4 * (1 - a ** (k + 1)) / (1 - a) / cost.seconds(4 + 4 * k, view.kv_tokens) for k in range(9)]
    assert controller.plan(view).tolist() == [int(np.argmax(rates))] * 4
    assert cost.seconds(20, 1000) == pytest.approx(steep(20, 1000, 0), rel=0.02)


def test_smartspec_averages_only_what_was_verified() -> None:
    controller = SmartSpecController()
    view = StepView(np.array([5]), np.array([4]), np.array([0]), 10)
    controller.record(StepRecord(view, np.array([0]), np.array([1]), np.array([1]), 0.01))
    assert controller.acceptance == SmartSpecController.start
    controller.record(
        StepRecord(view, np.array([4]), np.array([3]), np.array([2]), 0.01)
    )  # two right, one wrong
    assert controller.acceptance == pytest.approx(0.9 * 0.7 + 0.1 * 2 / 3)
