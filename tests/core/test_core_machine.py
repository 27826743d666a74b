"""Scheduler and allocator together under any order of events: nothing leaks, nobody starves, tokens are right."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from llmtool.core.admission import sibling_seed
from llmtool.core.request import BeamParams, FinishReason, SamplingParams
from llmtool.errors import QueueFull, RequestTooLong
from tests.support.core import expected, make_engine
from tests.support.pages import PARTS


class CoreMachine(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(6, 30),
        seats=st.integers(1, 6),
        budget=st.integers(6, 24),
        preemption=st.sampled_from(["recompute", "swap"]),
        policy=st.sampled_from(["fcfs", "priority"]),
        in_flight=st.integers(1, 3),
        caching=st.booleans(),
        model_name=st.sampled_from([None, None, *sorted(PARTS)]),
    )
    def start(
        self,
        pages: int,
        seats: int,
        budget: int,
        preemption: str,
        policy: str,
        in_flight: int,
        caching: bool,
        model_name: str | None,
    ) -> None:
        self.engine = make_engine(
            pages,
            host_pages=pages // 2,
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            preemption=preemption,
            policy=policy,
            max_in_flight=in_flight,
            prefix_caching=caching,
            model_name=model_name,
            max_waiting=12,
        )
        self.seats = seats
        self.want: dict[tuple[str, int], list[int]] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: set[tuple[str, int]] = set()
        self.aborted: set[str] = set()
        self.count = 0

    def take(self, outputs: list) -> None:
        for o in outputs:
            key = (o.request_id, o.index)
            assert key not in self.ended, "nothing comes after the end"
            self.got.setdefault(key, []).extend(o.token_ids)
            if o.finish_reason is not None:
                self.ended.add(key)
                assert (o.finish_reason == FinishReason.ABORT) == (o.request_id in self.aborted)

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 40),
        cut=st.integers(0, 40),
        tokens=st.integers(1, 15),
        n=st.integers(1, 3),
        width=st.integers(0, 3),
        priority=st.integers(0, 2),
    )
    def add(self, family: int, length: int, cut: int, tokens: int, n: int, width: int, priority: int) -> None:
        name = f"r{self.count}"
        self.count += 1
        prompt = [family if i < cut else 10 + self.count % 5 for i in range(length)]
        beam = 1 < width <= self.seats and self.count % 3 == 0
        if beam:
            params = SamplingParams(
                max_tokens=tokens, temperature=0.0, beam=BeamParams(width), n=min(n, width)
            )
        else:
            params = SamplingParams(max_tokens=tokens, n=n, temperature=1.0)
        try:
            self.engine.add(name, prompt, params, priority=priority, seed=self.count)
        except RequestTooLong:
            assert length + tokens > min(64, self.engine.scheduler.allocator.max_tokens())
            return
        except QueueFull:
            return
        for index in range(params.n):
            self.want[(name, index)] = (
                [] if beam else expected(prompt, tokens, sibling_seed(self.count, index))
            )

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.take(self.engine.step())

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = sorted({k[0] for k in self.want if k not in self.ended})
        if names:
            name = data.draw(st.sampled_from(names))
            self.aborted.add(name)
            self.take(self.engine.abort(name))

    @rule()
    def oldest_finishes(self) -> None:
        """Whatever else is going on, the first in line ends within a bound that does not depend on the rest."""
        scheduler = self.engine.scheduler
        unfinished = [r for g in scheduler._roster.groups.values() for r in g if not r.finished]
        if not unfinished:
            return
        oldest = min(unfinished, key=lambda r: r.sort_key)
        for _ in range(600):
            if oldest.finished:
                return
            self.take(self.engine.step())
        raise AssertionError(f"{oldest.id} starves")

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
        assert not self.engine.has_work, "everything ends"
        self.sound()
        assert self.engine.scheduler.allocator.usage()[0] == 0
        assert self.ended == set(self.want)
        for key, tokens in self.want.items():
            if key[0] in self.aborted or not tokens:
                continue
            assert self.got[key] == tokens


CoreMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestCore = CoreMachine.TestCase


@pytest.mark.slow
def test_core_long() -> None:
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=1500, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
