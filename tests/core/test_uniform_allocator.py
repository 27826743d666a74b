"""The paged allocator: the behaviours its users rely on, and a state machine against a plain model."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.geometry import UNIT, LayerCacheSpec, uniform_group
from llmtool.core.memory.uniform import UniformAllocator
from tests.support.core import group

P = 4


def make(pages: int, host: int = 0) -> UniformAllocator:
    return UniformAllocator(group(P), pages, host)


def run(a: UniformAllocator, seq: str, tokens: list[int], **options: object) -> int:
    """A whole sequence: begin, grow, publish. Returns the hit."""
    hit = a.begin(seq, tokens, len(tokens), **options)  # type: ignore[arg-type]
    a.extend(seq, len(tokens))
    a.advance(seq, len(tokens))
    return hit


def test_entries_are_offsets_in_units() -> None:
    layers = [LayerCacheSpec(i, 3, 64, 64, 2) for i in range(30)]
    kv = uniform_group(layers, 16)
    assert kv.page_bytes == 30 * 768 * 16 and kv.page_units * UNIT == kv.page_bytes
    a = UniformAllocator(kv, 4)
    a.begin("a", list(range(40)), 40)
    assert a.table("a") == ((0, kv.page_units, 2 * kv.page_units),)
    padded = uniform_group([LayerCacheSpec(0, 1, 8, 8, 2)], 3)
    assert (padded.payload_bytes, padded.page_bytes) == (96, 512)


@pytest.mark.parametrize(
    "first,second,hit",
    [
        (list(range(12)), list(range(12)), 8),  # the last page is computed again: something must be
        (list(range(13)), list(range(13)), 12),
        (list(range(12)), list(range(20)), 12),
        (list(range(12)), [0, 1, 2, 3, 9], 4),
        (list(range(3)), list(range(9)), 0),
        (list(range(12)), [1, *range(1, 12)], 0),
    ],
)
def test_hits(first: list[int], second: list[int], hit: int) -> None:
    a = make(20)
    assert run(a, "a", first) == 0
    assert run(a, "b", second) == hit
    a.check()
    a.end("a")
    a.end("b")
    assert run(a, "c", second) == (len(second) - 1) // P * P


def test_pages_are_evicted_deepest_first_and_oldest_first() -> None:
    a = make(6)
    run(a, "a", list(range(12)))
    a.end("a")
    run(a, "b", list(range(100, 108)))
    a.end("b")  # cached: a's three pages, b's two
    a.begin("c", [7] * 8, 8)  # one free page, one evicted: a's deepest
    a.end("c")
    assert run(a, "d", list(range(13))) == 8
    a.end("d")
    assert run(a, "e", list(range(100, 109))) == 8


def test_a_hit_on_a_cached_page_is_not_also_free() -> None:
    a = make(3)
    run(a, "a", list(range(8)))
    a.end("a")
    assert a.available() == 3
    with pytest.raises(OutOfPages) as e:
        a.begin("b", list(range(16)), 16)  # hits 2 of 4, but only one other page exists
    assert (e.value.needed, e.value.have, e.value.binding) == (2, 1, "full")
    a.check()
    assert run(a, "c", list(range(12))) == 8


def test_salt_isolates_and_reset_forgets() -> None:
    a = make(20)
    run(a, "a", list(range(12)), salt="x")
    assert run(a, "b", list(range(12)), salt="y") == 0
    assert not a.reset_cache(), "in use"
    a.end("a")
    a.end("b")
    assert a.reset_cache() and a.usage() == (0, 0)
    assert run(a, "c", list(range(12)), salt="x") == 0


def test_copy_on_write_copies_only_the_last_page() -> None:
    a = make(20)
    run(a, "a", list(range(10)))
    tokens = list(range(10))
    a.fork("a", "b", tokens, 10)
    assert a.table("a") == a.table("b") and a.ledger().pages_shared == 3
    e = a.extend("b", 11)
    assert e is not None and len(e.copies) == 1 and e.edits[0][:2] == (0, 2)
    assert e.copies[0].src == a.table("a")[0][2] and e.copies[0].dst == a.table("b")[0][2]
    last = a.extend("a", 11)
    assert last is None, "the last owner writes in place"
    assert a.ledger().pages_shared == 2
    a.check()


def test_failed_growth_changes_nothing() -> None:
    a = make(4)
    run(a, "a", list(range(12)))
    a.fork("a", "b", list(range(12)), 10)
    before = (a.table("a"), a.table("b"), a.ledger(), a.available())
    with pytest.raises(OutOfPages):
        a.extend("b", 16)  # a copy and one more page
    assert not a.can_extend("b", 16) and a.can_extend("b", 12)
    assert before == (a.table("a"), a.table("b"), a.ledger(), a.available())


def test_swap_moves_only_what_is_gone() -> None:
    a = make(4, host=4)
    tokens = list(range(10))
    run(a, "a", tokens)
    out = a.swap_out("a")
    assert out is not None and len(out) == 3 and a.usage() == (0, 2)
    back = a.swap_in("a")
    assert len(back) == 1, "two full pages were still in the cache"
    a.check()
    a.swap_out("a")
    run(a, "b", [50] * 16)  # takes every page
    a.end("b")
    assert len(a.swap_in("a")) == 3
    a.check()
    assert a.swap_out("a") is not None
    a.end("a")
    a.check()
    run(a, "c", [60] * 16)
    assert a.swap_out("c") is not None
    run(a, "d", [70] * 4)
    assert a.swap_out("d") is None, "no host page is left"


def test_bill_and_ledger_sum() -> None:
    a = make(10)
    run(a, "a", list(range(10)))
    token = group(P).bytes_per_token
    page = group(P).page_bytes
    assert a.bill("a") == {"tokens": 10 * token, "tail": 3 * page - 10 * token, "padding": 0, "shared": 0}
    ledger = a.ledger()
    assert (
        ledger.tokens + ledger.tail + ledger.cached + ledger.padding + ledger.free
        == ledger.arena
        == 10 * page
    )


class PagerMachine(RuleBasedStateMachine):
    """Against a model that stores, per sequence, what each of its positions must hold. Every position is written
    into its page and read back through the table, so that sharing by mistake or a lost copy shows."""

    @initialize(pages=st.integers(4, 14), host=st.integers(0, 8))
    def start(self, pages: int, host: int) -> None:
        self.a = make(pages, host)
        self.tokens: dict[str, list[int]] = {}
        self.written: dict[str, int] = {}
        self.swapped: set[str] = set()
        self.device: dict[int, list[int | None]] = {}
        self.host: dict[int, list[int | None]] = {}
        self.count = 0

    def _name(self) -> str:
        self.count += 1
        return f"s{self.count}"

    def _write(self, seq: str, upto: int) -> None:
        table = self.a.table(seq)[0]
        for position in range(self.written[seq], upto):
            page = self.device.setdefault(table[position // P], [None] * P)
            page[position % P] = self.tokens[seq][position]
        self.written[seq] = max(self.written[seq], upto)
        self.a.advance(seq, upto)

    def _resident(self) -> list[str]:
        return sorted(set(self.tokens) - self.swapped)

    @rule(
        length=st.integers(1, 24), base=st.integers(0, 2), cut=st.integers(1, 24), headroom=st.integers(0, 2)
    )
    def begin(self, length: int, base: int, cut: int, headroom: int) -> None:
        seq = self._name()
        # Prompts of a few families share prefixes and branch at `cut`.
        tokens = [base * 100 + i if i < cut else base * 100 + 50 + i for i in range(length)]
        available, ledger = self.a.available(), self.a.ledger()
        try:
            hit = self.a.begin(seq, tokens, length, headroom=headroom)
        except OutOfPages as e:
            assert e.needed > e.have
            assert (self.a.available(), self.a.ledger()) == (available, ledger)
            return
        assert hit % P == 0 and hit < length
        self.tokens[seq], self.written[seq] = tokens, hit
        self._write(seq, length)

    @precondition(lambda self: self._resident())
    @rule(data=st.data(), more=st.integers(1, 6))
    def extend(self, data: st.DataObject, more: int) -> None:
        seq = data.draw(st.sampled_from(self._resident()))
        target = len(self.tokens[seq]) + more
        possible = self.a.can_extend(seq, target)
        before = (self.a.table(seq), self.a.ledger())
        try:
            change = self.a.extend(seq, target)
        except OutOfPages:
            assert not possible and before == (self.a.table(seq), self.a.ledger())
            return
        assert possible
        for copy in () if change is None else change.copies:
            self.device[copy.dst] = list(self.device[copy.src])
        self.tokens[seq].extend(data.draw(st.lists(st.integers(0, 3), min_size=more, max_size=more)))
        self._write(seq, target)

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self._resident()))
        length = data.draw(st.integers(1, len(self.tokens[parent])))
        child = self._name()
        self.tokens[child] = self.tokens[parent][:length]
        self.written[child] = length
        self.a.fork(parent, child, self.tokens[child], length)

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self._resident()))
        length = data.draw(st.integers(1, len(self.tokens[seq])))
        del self.tokens[seq][length:]
        self.written[seq] = length
        assert self.a.truncate(seq, length) == (-(-length // P),)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), how=st.sampled_from(["end", "preempt"]))
    def finish(self, data: st.DataObject, how: str) -> None:
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        if how == "preempt":
            self.a.preempt(seq)
        else:
            self.a.end(seq)
        del self.tokens[seq], self.written[seq]
        self.swapped.discard(seq)

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self._resident()))
        copies = self.a.swap_out(seq)
        if copies is not None:
            self.swapped.add(seq)
            for copy in copies:
                self.host[copy.dst] = list(self.device[copy.src])

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.swapped)))
        try:
            copies = self.a.swap_in(seq)
        except OutOfPages:
            return
        self.swapped.remove(seq)
        for copy in copies:
            self.device[copy.dst] = list(self.host[copy.src])

    @rule()
    def reset(self) -> None:
        assert self.a.reset_cache() == (not self._resident())

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "a"):
            return
        self.a.check()
        for seq in self._resident():
            table = self.a.table(seq)[0]
            read = [self.device[table[p // P]][p % P] for p in range(len(self.tokens[seq]))]
            assert read == self.tokens[seq], seq
        tables = Counter(page for seq in self._resident() for page in self.a.table(seq)[0])
        shared = sum(1 for n in tables.values() if n > 1)
        assert self.a.ledger().pages_shared >= shared

    def teardown(self) -> None:
        if hasattr(self, "a"):
            for seq in list(self.tokens):
                self.a.end(seq)
            self.a.check()
            assert self.a.usage()[0] == 0 and self.a.available() == self.a.num_pages


PagerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestPager = PagerMachine.TestCase


@pytest.mark.slow
def test_pager_long() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        PagerMachine, settings=settings(max_examples=1500, stateful_step_count=60, deadline=None)
    )
