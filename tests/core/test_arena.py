"""The two-level arena: Jenga's five steps one by one, and a state machine against a plain model."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.arena import Arena
from llmtool.core.memory.arena_pages import SmallPages
from llmtool.core.memory.geometry import UNIT
from llmtool.core.memory.page_plan import plan_pages
from llmtool.sim.catalogue import geometry_of

A, B = SmallPages("a", UNIT, 6), SmallPages("b", 2 * UNIT, 3)


def make(large: int) -> Arena:
    return Arena([A, B], 7 * UNIT, large)


def one(arena: Arena, kind: int, request: str) -> int:
    return arena.take([int(kind == 0), int(kind == 1)], request).pages[kind][0]


def large_of(arena: Arena, page: int) -> int:
    return page // arena.width


def test_entries_of_a_bounded_page_are_strided_offsets() -> None:
    arena = make(3)
    a, b = arena.take([2, 0], "x").pages[0], arena.take([0, 2], "x").pages[1]
    assert [arena.entry(p) for p in a] == [0, 1] and [arena.entry(p) for p in b] == [7, 9]
    plan = plan_pages(geometry_of("gemma-3-27b"))
    assert [t.per_large for t in Arena.of(plan, 4).types] == [pool.per_large for pool in plan.pools]


def test_step_1_an_empty_small_page_of_the_same_request() -> None:
    arena = make(3)
    x, y = one(arena, 0, "x"), one(arena, 0, "y")
    assert large_of(arena, x) != large_of(arena, y), "step 2: requests keep apart while there is room"
    assert large_of(arena, one(arena, 0, "y")) == large_of(arena, y)
    assert large_of(arena, one(arena, 0, "x")) == large_of(arena, x)


def test_step_3_the_least_recently_used_large_page_of_any_type() -> None:
    arena = make(2)
    x, y = arena.take([2, 0], "x").pages[0], arena.take([0, 1], "y").pages[1]
    arena.release(x[0], now=1)
    arena.release(y[0], now=5)
    arena.release(x[1], now=9)  # x's large page counts by its latest access
    taken = arena.take([1, 0], "z")
    assert taken.evicted == y and large_of(arena, taken.pages[0][0]) == large_of(arena, y[0])
    arena.check()


def test_step_4_then_5_when_no_large_page_is_left() -> None:
    arena = make(1)
    pages = arena.take([5, 0], "x").pages[0]
    arena.release(pages[1], now=3)
    arena.release(pages[2], now=2)
    assert arena.take([1, 0], "y").evicted == (), "step 4: another request's empty small page"
    assert arena.take([1, 0], "y").evicted == (pages[2],), "step 5: the least recently used"
    with pytest.raises(OutOfPages) as error:
        arena.take([2, 0], "y")
    assert (error.value.needed, error.value.have, error.value.binding) == (2, 1, "a")


def test_pages_read_together_are_evicted_deepest_first() -> None:
    arena = make(1)
    pages = arena.take([6, 0], "x").pages[0]
    for depth, page in enumerate(pages[:3]):
        arena.release(page, now=7, depth=depth)
    assert arena.take([2, 0], "y").evicted == (pages[2], pages[1])


def test_a_demand_of_two_types_does_not_starve_one() -> None:
    arena = make(2)
    arena.take([5, 0], "x")
    # One large page is left. y alone would open it for its `a` (step 2), and then have no place for its `b`.
    taken = arena.take([1, 1], "y")
    assert [large_of(arena, page) for (page,) in taken.pages] == [0, 1]
    arena.check()


def test_a_large_page_goes_back_when_all_its_small_pages_are_empty() -> None:
    arena = make(1)
    (page,) = arena.take([1, 0], "x").pages[0]
    assert not arena.fits([0, 1])
    arena.hold(page)
    arena.release(page, now=1)
    assert arena.references(page) == 1 and not arena.fits([0, 1])
    arena.release(page, now=2)
    assert arena.is_evictable(page) and arena.fits([0, 3])
    arena.forget(page)
    assert arena.ledger()["free"] == arena.large_page
    assert arena.take([0, 3], "y").evicted == ()


class ArenaMachine(RuleBasedStateMachine):
    """The model knows, per page, who refers to it and what was written into it, and counts by brute force whether
    a demand can be met. Every page's content is written at its table entry and read back from there."""

    @initialize(large=st.integers(1, 6))
    def start(self, large: int) -> None:
        self.a = make(large)
        self.now = 0
        self.held: dict[int, tuple[int, int]] = {}  # page -> type, references
        self.kept: dict[int, tuple[int, int, int]] = {}  # page -> type, access, depth
        self.memory: dict[int, int] = {}  # unit -> stamp
        self.stamp: dict[int, int] = {}  # page -> its stamp
        self.stamps = 0

    def _units(self, page: int, kind: int) -> range:
        entry = self.a.entry(page)
        return range(entry, entry + self.a.types[kind].stride // UNIT)

    def _possible(self, wants: list[int]) -> bool:
        """Page by page: slots that are not used in large pages in use, the rest in large pages nobody uses."""
        used: dict[int, list[int]] = {}
        for page, (kind, _) in self.held.items():
            used.setdefault(page // self.a.width, []).append(kind)
        idle = self.a.num_large - len(used)
        for kind, want in enumerate(wants):
            here = [self.a.types[kind].per_large - len(k) for k in used.values() if k[0] == kind]
            missing = want - sum(here)
            while missing > 0:
                missing -= self.a.types[kind].per_large
                idle -= 1
        return idle >= 0

    @rule(a=st.integers(0, 7), b=st.integers(0, 4), request=st.sampled_from("xyz"))
    def take(self, a: int, b: int, request: str) -> None:
        possible = self._possible([a, b])
        before = repr(vars(self.a))
        assert self.a.fits([a, b]) == possible
        try:
            taken = self.a.take([a, b], request)
        except OutOfPages as error:
            assert not possible and error.needed > error.have
            assert before == repr(vars(self.a)), "a failed demand changes nothing"
            return
        assert possible and [len(pages) for pages in taken.pages] == [a, b]
        for page in taken.evicted:
            del self.kept[page], self.stamp[page]
        for kind, pages in enumerate(taken.pages):
            for page in pages:
                assert page not in self.held and page not in self.kept
                self.held[page] = (kind, 1)
                self.stamps += 1
                self.stamp[page] = self.stamps
                self.memory.update(dict.fromkeys(self._units(page, kind), self.stamps))

    @precondition(lambda self: self.held or self.kept)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted([*self.held, *self.kept])))
        self.a.hold(page)
        kind, refs = self.held.get(page, (self.kept[page][0] if page in self.kept else 0, 0))
        self.kept.pop(page, None)
        self.held[page] = (kind, refs + 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 6), depth=st.integers(0, 3), keep=st.booleans())
    def release(self, data: st.DataObject, count: int, depth: int, keep: bool) -> None:
        for _ in range(min(count, len(self.held))):
            page = data.draw(st.sampled_from(sorted(self.held)))
            self.now += data.draw(st.integers(0, 1))
            self.a.release(page, self.now, depth, keep)
            kind, refs = self.held.pop(page)
            if refs > 1:
                self.held[page] = (kind, refs - 1)
            elif keep:
                self.kept[page] = (kind, self.now, depth)
            else:
                del self.stamp[page]

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.kept)))
        self.a.forget(page)
        del self.kept[page], self.stamp[page]

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "a"):
            return
        self.a.check()
        for page, stamp in self.stamp.items():
            kind = (self.held.get(page) or self.kept[page])[0]
            assert {self.memory[unit] for unit in self._units(page, kind)} == {stamp}, "overwritten"
            assert self.a.is_evictable(page) == (page in self.kept)
            assert self.a.references(page) == self.held.get(page, (0, 0))[1]
        ledger = self.a.ledger()
        assert ledger["used"] == sum(self.a.types[kind].stride for kind, _ in self.held.values())
        assert ledger["evictable"] == sum(self.a.types[kind].stride for kind, _, _ in self.kept.values())

    def teardown(self) -> None:
        if hasattr(self, "a"):
            for page, (_, refs) in self.held.items():
                for _ in range(refs):
                    self.a.release(page, self.now, keep=False)
            for page in self.kept:
                self.a.forget(page)
            self.a.check()
            assert self.a.ledger()["free"] == self.a.num_large * self.a.large_page


ArenaMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestArena = ArenaMachine.TestCase


@pytest.mark.slow
def test_arena_long() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        ArenaMachine, settings=settings(max_examples=1500, stateful_step_count=60, deadline=None)
    )
