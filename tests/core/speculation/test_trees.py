"""Trees of drafts: what the suffix proposer shows, how far controllers let them grow, and that they stay trees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.core.ports import DraftTree, ScheduledRequest, SchedulerOutput, StepResult
from llmtool.core.request import Request, SamplingParams
from llmtool.core.speculation.acceptance import AcceptanceTable
from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.build import check_speculation, speculator_of
from llmtool.core.speculation.controllers import FixedController
from llmtool.core.speculation.draft import MAX_DEPTH, MAX_NODES, Branch, Draft, StepRecord, StepView
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.speculation.suffix import SuffixProposer
from llmtool.errors import UsageError
from tests.core.speculation.bushes import Bushy


def paths(tokens: Sequence[int], parents: Sequence[int]) -> set[tuple[int, ...]]:
    """Every way from the root that a tree shows."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return set(found)


def prefixes(ways: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(way[: i + 1]) for way in ways for i in range(len(way))}


def test_a_tree_by_hand() -> None:
    branches = [Branch((7, 8), 3, 0, 1), Branch((9,), 2, 1, 1), Branch((4, 4), 2, 0, 0)]
    draft = Draft((1, 2, 3), "x", 5, branches)
    assert draft.flatten([3, 2, 1, 2]) == ([1, 2, 3, 7, 8, 9, 4, 4], [-1, 0, 1, 0, 3, 3, -1, 6])
    assert draft.path(2, 1) == [1, 7, 9] and draft.path(3, 0) == [] and draft.path(0, 2) == [1, 2]
    assert draft.flatten([0, 2, 1, 1]) == ([4], [-1]), "what they leave is not there"
    assert draft.flatten([1, 0, 1, 0]) == ([1], [-1])


@given(st.integers(0, 100_000))
@settings(max_examples=150, deadline=None)
def test_the_suffix_proposer_shows_how_matches_went_on(seed: int) -> None:
    """Against all places, looked through one by one, where the last two tokens stood before."""
    rng = random.Random(seed)
    own = [rng.randrange(4) for _ in range(rng.randint(3, 40))]
    other = [rng.randrange(4) for _ in range(rng.randint(0, 30))]
    limit, count = rng.randint(1, 6), rng.randint(2, 8)
    proposer = SuffixProposer(branches=count)
    if other:
        proposer.begin("b", other)
        proposer.finish("b")
    proposer.begin("a", own[:2])
    for token in own[2:]:
        proposer.observe("a", [token])
    draft = proposer.propose("a", limit)
    ends = [i for i in range(2, len(own)) if own[i - 2 : i] == own[-2:]]
    ends_there = [i for i in range(2, len(other)) if other[i - 2 : i] == own[-2:]]
    ways = [own[i : i + limit] for i in ends] + [other[i : i + limit] for i in ends_there]
    plain = SuffixProposer()
    if other:
        plain.begin("b", other)
        plain.finish("b")
    plain.begin("a", own)
    assert len(draft.branches) < count
    assert len(draft.tokens) == len(plain.propose("a", limit).tokens)
    lengths = [len(draft.tokens), *(len(branch.tokens) for branch in draft.branches)]
    shown = paths(*draft.flatten(lengths))
    assert len(shown) == sum(lengths), "no way is shown twice"
    real = prefixes(ways) | prefixes([draft.tokens])
    assert shown <= real and all(len(way) <= limit for way in shown)
    if draft.tokens and len(ends) <= 8 and len(ends_there) <= 8 and len(draft.branches) < count - 1:
        assert shown == real, "with branches to spare, every way is shown"


def view_of(branches: Sequence[tuple[int, int, int]], limits: Sequence[int], batch: int) -> StepView:
    """branches: (row that it leaves, after, match)."""
    size = len(limits)
    return StepView(
        matches=np.array([8] * batch + [match for *_, match in branches]),
        limits=np.array(limits),
        sources=np.array([0] * batch + [1] * len(branches)),
        kv_tokens=100,
        on=np.array([on for on, *_ in branches], np.int64),
        at=np.array([at for _, at, _ in branches], np.int64),
    ) if size else pytest.fail("a step without drafts")  # fmt: skip


def learned(per_token: float, chances: tuple[float, float], seed: int) -> AutoController:
    """A controller that knows a step's cost, and how often drafts and branches are right."""
    auto, rng = AutoController(), np.random.default_rng(seed)
    for n in (1, 2, 4, 8, 16, 24):
        for _ in range(4):
            auto.cost.record(n, 100, 0, 0.01 + per_token * n)
    for _ in range(200):
        view = view_of([(0, 0, 8)], [8, 8], 1)
        right = [int((rng.random(8) >= chance).argmax()) for chance in chances]
        auto.acceptance.record(
            StepRecord(view, np.zeros(2, np.int64), np.array([9, 9]), np.array(right), 0.01)
        )
    return auto


@pytest.mark.parametrize("per_token", [1e-5, 5e-4, 2e-3, 8e-3])
@pytest.mark.parametrize("chances", [(0.8, 0.3), (0.3, 0.6), (0.1, 0.05)])
def test_a_tree_grows_as_far_as_brute_force_says(per_token: float, chances: tuple[float, float]) -> None:
    branches = [(0, 1, 4), (0, 0, 8), (2, 1, 3)]  # rows 1, 2 and 3; the last leaves row 2
    limits = [3, 2, 3, 2]
    auto = learned(per_token, chances, 3)
    view = view_of(branches, limits, 1)
    lengths = auto.plan(view)
    survival = auto.acceptance.survival()[auto.acceptance.rows(view.sources, view.matches)]
    rate = auto._last["goodput"]
    best, best_gain = None, -np.inf
    for trial in product(*(range(limit + 1) for limit in limits)):
        if any(trial[i] and at > trial[on] for i, (on, at, _) in enumerate(branches, 1)):
            continue
        tokens, base = 1.0, [1.0]
        for row, length in enumerate(trial):
            if row:
                on, at, _ = branches[row - 1]
                base.append(base[on] * (survival[on, at - 1] if at else 1.0))
            tokens += base[row] * survival[row, :length].sum()
        gain = tokens - rate * auto.cost.seconds(1 + sum(trial), 100)
        if gain > best_gain + 1e-9:
            best, best_gain = trial, gain
    assert best is not None
    assert lengths.tolist() == list(best)
    if per_token == 1e-5 and chances[0] > 0.5:
        assert sum(best) == sum(limits), "what costs nothing is all verified"
    if per_token == 8e-3 and chances[0] < 0.2:
        assert sum(best) == 0


def test_branches_are_scored_where_the_path_to_them_was_right() -> None:
    """Against counting by hand."""
    table = AcceptanceTable()
    view = view_of([(0, 1, 8), (0, 2, 8)], [3, 2, 1], 1)
    # Emitted: two tokens, so that only the branch after the first token is met.
    record = StepRecord(view, np.array([3, 2, 1]), np.array([3, 2, 0]), np.array([1, 1, 0]), 0.01)
    table.record(record)
    tries, hits = table._counts
    rows = table.rows(view.sources, view.matches)
    assert tries[rows[0]].tolist()[:3] == [1, 1, 0] and hits[rows[0]].tolist()[:3] == [1, 0, 0]
    assert tries[rows[1]].tolist()[:2] == [1, 1] and hits[rows[1]].tolist()[:2] == [1, 0]


class Planned(FixedController):
    """Remembers what it was told."""

    def record(self, record: StepRecord) -> None:
        self.records = [*getattr(self, "records", []), record]


@given(st.integers(0, 100_000))
@settings(max_examples=100, deadline=None)
def test_what_is_scheduled_are_trees_of_the_right_size(seed: int) -> None:
    rng = random.Random(seed)
    truth = [rng.randrange(50) for _ in range(200)]
    proposer = Bushy(lambda tokens, seq: truth[len(tokens)], 0.6, lambda t: t + 1, seed, branches=8)
    k = rng.randint(1, MAX_DEPTH)
    controller = Planned(k) if rng.random() < 0.5 else learned(1e-5, (0.7, 0.5), seed)
    speculator = Speculator(controller, proposer)
    work = []
    for i in range(rng.randint(1, 3)):
        known = truth[: rng.randint(2, 60)]
        params = SamplingParams(max_tokens=rng.randint(2, 70), spec=rng.choice([None, None, 3]))
        assert params.max_tokens is not None
        work.append(Request(str(i), str(i), 0, known, len(known), params, 0.0, params.max_tokens))
    entries = [ScheduledRequest(r.id, len(r.token_ids) - 1, 1, True) for r in work]
    out = SchedulerOutput(0, scheduled=entries, num_tokens=len(entries))
    room = rng.randint(0, 150)
    drafts = speculator.plan(out, list(range(len(work))), work, room)
    total, emitted = 0, []
    for entry, request, draft in zip(entries, work, drafts, strict=True):
        tokens = list(draft.tokens) if isinstance(draft, DraftTree) else list(draft)
        parents = list(draft.parents) if isinstance(draft, DraftTree) else list(range(-1, len(tokens) - 1))
        assert all(-1 <= parent < i for i, parent in enumerate(parents))
        assert len(tokens) <= min(MAX_NODES, request.max_tokens - 1)
        if request.params.spec is not None:
            assert not isinstance(draft, DraftTree) and len(tokens) <= 3
        elif isinstance(controller, Planned):
            assert all(len(path) <= k for path in paths(tokens, parents))
        total += len(tokens)
        entry.draft, entry.parents = tuple(tokens), tuple(parents)
        known, walk, said = len(request.token_ids), -1, [truth[len(request.token_ids)]]
        while (
            node := next((i for i in range(len(tokens)) if parents[i] == walk and tokens[i] == said[-1]), -1)
        ) >= 0:
            walk = node
            said.append(truth[known + len(said)])
        emitted.append(said)
    assert total <= room
    speculator.record(out, StepResult(0, emitted, seconds=0.01))
    if isinstance(controller, Planned):
        (record,) = controller.records
        assert record.lengths.sum() == total and record.emitted[: len(work)].tolist() == [*map(len, emitted)]
        assert (record.matched <= record.emitted).all()


def test_a_static_tree_goes_as_far_on_every_way() -> None:
    """Three draft tokens from the root, along the draft and along whatever leaves it."""
    truth = list(range(100, 140))

    class Fork(Bushy):
        def propose(self, seq: str, limit: int) -> Draft:
            branches = [Branch((7, 8, 9, 6), 4, 0, 1), Branch((5, 5, 5, 5), 3, 0, 0), Branch((4, 4), 3, 1, 1)]
            return Draft((1, 2, 3, 3, 3), "fork", 5, branches)

    request = Request("0", "0", 0, truth[:5], 5, SamplingParams(max_tokens=30), 0.0, 30)
    out = SchedulerOutput(0, scheduled=[ScheduledRequest("0", 4, 1, True)], num_tokens=1)
    speculator = Speculator(FixedController(3), Fork(lambda tokens, seq: 0, 1.0, lambda t: t))
    (draft,) = speculator.plan(out, [0], [request], 100)
    assert isinstance(draft, DraftTree)
    ways = [(1, 2, 3), (1, 7, 8), (5, 5, 5), (1, 7, 4)]
    assert paths(draft.tokens, draft.parents) == prefixes(ways)


def test_settings() -> None:
    made = speculator_of("auto", "suffix", None, 4)
    assert made is not None and isinstance(made._proposer, SuffixProposer) and made._proposer.branches == 4
    for proposer, branches in (("suffix", 0), ("suffix", 9), ("pruned", 2)):
        with pytest.raises(UsageError):
            check_speculation("auto", proposer, branches)
    check_speculation("3", "union:pruned", 8)
