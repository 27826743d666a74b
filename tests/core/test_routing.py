"""Routers: which engine a request goes to, for loads and prompts of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtool.core.routing import BLOCK, ROUTERS, SHARE, SLACK, PrefixAware, make_router
from llmtool.errors import UsageError


@pytest.mark.parametrize("name", ROUTERS)
@given(loads=st.lists(st.one_of(st.none(), st.integers(0, 40)), min_size=1, max_size=5))
def test_an_engine_that_is_down_gets_nothing(name: str, loads: list[int | None]) -> None:
    loads.append(3)
    router = make_router(name)
    for turn in range(len(loads)):
        assert loads[router.pick(loads, [turn] * 100)] is not None


@given(loads=st.lists(st.integers(0, 40), min_size=1, max_size=5), length=st.integers(0, 200))
def test_without_a_known_prefix_the_least_loaded_is_chosen(loads: list[int], length: int) -> None:
    chosen = PrefixAware().pick(loads, range(length))
    assert chosen == make_router("least-loaded").pick(loads) == loads.index(min(loads))


def test_round_robin_takes_turns_around_what_is_down() -> None:
    router = make_router("round-robin")
    assert [router.pick([0, None, 0, 0]) for _ in range(6)] == [0, 2, 3, 0, 2, 3]


def test_a_prompt_goes_where_its_beginning_went() -> None:
    router, stem, other = PrefixAware(), list(range(3 * BLOCK)), [9] * (3 * BLOCK)
    assert router.pick([0, 0, 0], [*stem, 1]) == 0
    assert router.pick([1, 0, 0], [*other, 1]) == 1
    assert router.pick([1, 1, 0], [*stem, 2]) == 0
    assert router.pick([2, 1, 0], [*other, 2]) == 1
    assert router.pick([2, 2, 0], [*stem[: 2 * BLOCK], 7]) == 0, "two blocks of three are better than none"
    assert router.pick([3, 2, 0], stem[: BLOCK - 1]) == 2, "less than a block is not looked up"
    assert router.pick([3, 2, 0], stem, salt="tenant") == 2, "a salt shares nothing"
    router.forget(0)
    assert router.pick([3, 2, 0], [*stem[: 2 * BLOCK], 8]) == 2


@given(loads=st.lists(st.integers(0, 60), min_size=2, max_size=6))
def test_a_prefix_that_all_share_does_not_end_up_on_one_engine(loads: list[int]) -> None:
    router, prompt = PrefixAware(), [5] * (4 * BLOCK)
    loads = list(loads)
    start = max(loads)
    for _ in range(200):
        least = min(loads)
        chosen = router.pick(loads, prompt)
        assert loads[chosen] <= least * (1 + SHARE) + SLACK
        loads[chosen] += 1
    assert max(loads) <= max(start, min(loads) * (1 + SHARE) + SLACK + 1)


def test_what_was_sent_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtool.core.routing.REMEMBERED", 8)
    router = PrefixAware()
    stem = list(range(4 * BLOCK))
    assert router.pick([0, 0], stem) == 0
    assert router.pick([1, 0], stem) == 0
    for i in range(2):
        assert router.pick([0, 1], [100 + i] * (4 * BLOCK)) == 0
    assert router.pick([1, 0], stem) == 1, "eight other blocks went there since"


def test_an_unknown_router_is_refused() -> None:
    with pytest.raises(UsageError, match="'random' is unknown"):
        make_router("random")
