"""The allocator for several layer types: a state machine over every kind, with fingerprints in the pages."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llmtool.core.memory.allocator import Extension, OutOfPages
from llmtool.core.memory.hashing import page_hash, root_hash
from llmtool.core.memory.layer_policy import live_blocks
from llmtool.core.memory.page_plan import Mode, plan_pages
from llmtool.core.memory.prefix_index import NONE
from llmtool.core.memory.two_level import TwoLevelAllocator
from tests.support.pages import PARTS, PageMemory, Work, model

T = 4


def make(
    name: str, pages: int, host: int = 0, mode: Mode = "near", large: int = 8192, **options: Any
) -> TwoLevelAllocator:
    plan = plan_pages(model(name), T, large, mode)
    options = {"step_tokens": 24, "checkpoint_every": 16, "renew_every": T} | options
    return TwoLevelAllocator(plan, pages, host, **options)


def brute_hit(a: TwoLevelAllocator, tokens: list[int], salt: str = "") -> int:
    """The longest prefix for which every page that the next token reads is cached, by trying them all."""
    size, keys, parent = a.block, [], root_hash(salt)
    for start in range(0, len(tokens) - size, size):
        parent = page_hash(parent, tokens[start : start + size])
        keys.append(parent)
    for n in range(len(keys), 0, -1):
        good = all(
            a.cache.index.find(keys[i], column) != NONE
            for t in a.tables
            for i in live_blocks(t.spec, n, size)
            for column in t.columns
        )
        if good:
            return n * size
    return 0


def snapshot(a: TwoLevelAllocator) -> tuple[Any, ...]:
    arena = a.arena
    lists = (arena._owner, arena._request, arena._empty, arena._used, arena._refs, arena._evictable)
    stamps = [arena.key(p) for p in range(len(arena._refs)) if arena.is_evictable(p)]
    names = sorted((p, a.cache.index.name_of(p)) for p in a.cache.index.pages())
    return [list(x) for x in lists], stamps, names, sorted(arena._free), a.ledger(), a.cache.clock


class MemoryMachine(RuleBasedStateMachine):
    @initialize(
        name=st.sampled_from(sorted(PARTS)),
        pages=st.integers(2, 14),
        host=st.integers(0, 6),
        large=st.sampled_from([4096, 8192, 16384]),
        mode=st.sampled_from(["near", "near", "lcm", "max"]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, name: str, pages: int, host: int, large: int, mode: Mode, caching: bool) -> None:
        self.a = make(name, pages, host, mode, large, prefix_caching=caching)
        self.device, self.host = PageMemory(self.a.groups), PageMemory(self.a.groups)
        self.tokens: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.swapped: set[str] = set()
        self.step: list[Work] = []
        self.count = 0

    def flush(self) -> None:
        """The step that has been put together runs."""
        self.device.run(self.step)
        self.step = []

    def resident(self, idle: bool = False) -> list[str]:
        busy = {work.seq for work in self.step} if idle else set()
        return sorted(set(self.tokens) - self.swapped - busy)

    def compute(self, seq: str, end: int, grown: Extension | None = None) -> None:
        """A part in the step; its copies run before the step does."""
        if grown is not None:
            self.device.copy_from(self.device, grown.copies)
        self.step.append(Work(seq, self.a.table(seq), list(self.tokens[seq]), self.computed[seq], end))
        self.computed[seq] = end
        self.a.advance(seq, end)

    @rule(
        length=st.integers(1, 60),
        base=st.integers(0, 2),
        cut=st.integers(1, 60),
        part=st.integers(1, 24),
        salt=st.sampled_from(["", "", "tenant"]),
        headroom=st.integers(0, 1),
    )
    def begin(self, length: int, base: int, cut: int, part: int, salt: str, headroom: int) -> None:
        self.count += 1
        seq = f"s{self.count}"
        tokens = [
            base * 100 + i if i < cut else base * 100 + 70 + (self.count * i) % 7 for i in range(length)
        ]
        before, best = snapshot(self.a), brute_hit(self.a, tokens, salt)
        try:
            hit = self.a.begin(seq, tokens, part, salt=salt, headroom=headroom)
        except OutOfPages as e:
            assert e.needed > e.have
            assert snapshot(self.a) == before
            return
        assert hit == (best if self.a.prefix_caching else 0)
        self.tokens[seq], self.computed[seq] = tokens, hit
        self.compute(seq, min(length, hit + part))

    @precondition(lambda self: self.resident(idle=True))
    @rule(data=st.data(), more=st.integers(1, 24))
    def extend(self, data: st.DataObject, more: int) -> None:
        seq = data.draw(st.sampled_from(self.resident(idle=True)))
        target, known = self.computed[seq] + more, self.tokens[seq]
        possible = self.a.can_extend(seq, target)
        before = (self.a.table(seq), snapshot(self.a))
        try:
            grown = self.a.extend(seq, target)
        except OutOfPages as e:
            assert not possible and e.needed > e.have and before == (self.a.table(seq), snapshot(self.a))
            return
        assert possible
        if target > len(known):
            more = target - len(known)
            known.extend(data.draw(st.lists(st.integers(0, 2), min_size=more, max_size=more)))
        self.compute(seq, target, grown)

    @rule()
    def next_step(self) -> None:
        self.flush()

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), near=st.booleans())
    def fork(self, data: st.DataObject, near: bool) -> None:
        parent = data.draw(st.sampled_from(self.resident()))
        computed = self.computed[parent]
        length = computed if near else data.draw(st.integers(1, computed))
        self.flush()
        if not self.a.can_fork(parent, length):
            assert length < computed, "what was computed last can always go on in two ways"
            return
        self.count += 1
        child = f"s{self.count}"
        self.tokens[child], self.computed[child] = self.tokens[parent][:length], length
        self.a.fork(parent, child, self.tokens[child], length)

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.resident()))
        length = data.draw(st.integers(1, self.computed[seq]))
        if self.a.can_rewind and self.a.can_fork(seq, length):
            self.flush()
            del self.tokens[seq][length:]
            self.computed[seq] = length
            assert self.a.truncate(seq, length) == tuple(-(-length // t.tokens) for t in self.a.tables)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), how=st.sampled_from(["end", "preempt"]))
    def finish(self, data: st.DataObject, how: str) -> None:
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        if how == "end" or seq in {work.seq for work in self.step}:
            self.flush()
            self.a.end(seq)
        else:
            self.a.preempt(seq)
        del self.tokens[seq], self.computed[seq]
        self.swapped.discard(seq)

    @precondition(lambda self: self.resident(idle=True))
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.resident(idle=True)))
        self.flush()
        copies = self.a.swap_out(seq)
        if copies is not None:
            self.swapped.add(seq)
            self.host.copy_from(self.device, copies)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data(), more=st.integers(0, 9))
    def swap_in(self, data: st.DataObject, more: int) -> None:
        seq = data.draw(st.sampled_from(sorted(self.swapped)))
        before = snapshot(self.a)
        try:
            copies = self.a.swap_in(seq, self.computed[seq] + more)
        except OutOfPages:
            assert snapshot(self.a) == before
            return
        self.flush()
        self.swapped.remove(seq)
        self.device.copy_from(self.host, copies)

    @rule()
    def reset(self) -> None:
        assert self.a.reset_cache() == (not self.resident())

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "a"):
            return
        self.a.check()
        for seq in self.resident(idle=True):
            if end := self.computed[seq]:
                self.device.verify(Work(seq, self.a.table(seq), self.tokens[seq], end, end))

    def teardown(self) -> None:
        if hasattr(self, "a"):
            self.flush()
            for seq in list(self.tokens):
                self.a.end(seq)
            self.a.check()
            assert self.a.usage()[0] == 0 and self.a.available() == self.a.num_pages
            assert self.a.ledger().tokens == self.a.ledger().tail == 0
            assert self.a.reset_cache() and self.a.ledger().free == self.a.ledger().arena


MemoryMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestMemory = MemoryMachine.TestCase


@pytest.mark.slow
def test_memory_long() -> None:
    """More than 50,000 rule steps."""
    run_state_machine_as_test(
        MemoryMachine,
        settings=settings(
            max_examples=1500,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
