"""Speculation in the scheduler: with an executor that answers from its pages, every request gets the tokens that it
would get alone, whatever is drafted, and pages come back when drafts were wrong."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.geometry import LayerCacheSpec
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import SchedulerOutput, VirtualClock
from llmtool.core.request import BeamParams, SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.controllers import (
    Controller,
    FixedController,
    SmartSpecController,
    TableController,
)
from llmtool.core.speculation.draft import Proposer
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.speculation.suffix import SuffixProposer
from llmtool.core.steplog import StepLogWriter, replay
from llmtool.errors import RequestError
from tests.core.speculation.drafters import Knowing
from tests.support.core import VOCAB, MemoryExecutor, expected, group, make_engine, next_token

SEEDS = {str(i): i for i in range(100)}


def truth(tokens: Sequence[int], seq: str) -> int:
    return next_token(tokens, SEEDS[seq])


CONTROLLERS = {
    "off": lambda: FixedController(0),
    "1": lambda: FixedController(1),
    "3": lambda: FixedController(3),
    "16": lambda: FixedController(16),
    "table": lambda: TableController({1: 5, 3: 2, 6: 0}),
    "smartspec": SmartSpecController,
    "auto": AutoController,
}


def run(
    engine: Engine, arrivals: Sequence[tuple[Sequence[int], SamplingParams]], seed: int = 0
) -> dict[str, list[int]]:
    rng = random.Random(seed)
    outputs: dict[str, list[int]] = {}
    size = engine.scheduler.allocator.groups[0].tokens_per_page

    def step() -> None:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
        for entry in engine.last_step.scheduled if engine.last_step else ():
            state = engine.scheduler.allocator._seqs.get(entry.id)  # type: ignore[attr-defined]
            if state is not None and state.host is None:
                assert len(state.hashes) * size <= len(state.token_ids), "no unverified token is in the cache"
        engine.scheduler.check()

    for i, (prompt, params) in enumerate(arrivals):
        engine.add(str(i), prompt, params, seed=i)
        for _ in range(rng.randint(0, 3)):
            step()
    for _ in range(3000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work and engine.stats.pages_used == 0
    return outputs


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB) for _ in range(12)]
    return [
        stem[: rng.randint(0, 12)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    "condition",
    [
        {},
        {"num_pages": 15},
        {"num_pages": 15, "host_pages": 40, "preemption": "swap"},
        {"max_num_batched_tokens": 9},
    ],
    ids=["plenty", "recompute", "swap", "small budget"],
)
def test_tokens_are_those_of_decoding_alone(name: str, chance: float, condition: dict[str, object]) -> None:
    proposer = Knowing(truth, chance, wrong=lambda token: (token + 1) % VOCAB)
    engine = make_engine(drafts=Speculator(CONTROLLERS[name](), proposer), **{"num_pages": 64, **condition})  # type: ignore[arg-type]
    arrivals = [(p, SamplingParams(max_tokens=5 + 3 * i, temperature=0)) for i, p in enumerate(prompts(9, 1))]
    outputs = run(engine, arrivals)
    for i, (prompt, params) in enumerate(arrivals):
        assert outputs[str(i)] == expected(prompt, params.max_tokens or 0, i), i
    spec = engine.stats.spec
    assert spec is not None and spec.accepted_tokens <= spec.draft_tokens
    if name in ("1", "3", "16"):
        assert spec.draft_tokens > 0 and (spec.accepted_tokens > 0) == (chance > 0)
        assert (spec.accepted_tokens == spec.draft_tokens) == (chance == 1)
        assert sum(spec.accepted_at) == spec.accepted_tokens
    if condition.get("num_pages") == 15 and chance < 1:  # the right drafts are done before pages run out
        assert engine.stats.preemptions > 0
    assert not proposer.tokens
    for i, (prompt, _) in enumerate(arrivals):
        if str(i) in proposer.finished:
            assert proposer.finished[str(i)] == prompt + outputs[str(i)], "it was told of every token once"


@given(st.integers(0, 10_000), st.integers(0, 16), st.sampled_from([1, 2, 4, 8]), st.integers(14, 64))
@settings(max_examples=60, deadline=None)
def test_any_lengths_pages_and_ends(seed: int, k: int, tokens_per_page: int, num_pages: int) -> None:
    rng = random.Random(seed)
    proposer = Knowing(
        truth, rng.random(), wrong=lambda token: rng.choice([VOCAB + 5, -3, (token + 1) % VOCAB])
    )
    engine = make_engine(
        drafts=Speculator(FixedController(k), proposer),
        num_pages=num_pages * 4 // tokens_per_page,
        tokens_per_page=tokens_per_page,
        eos=[7, 8],
        max_num_batched_tokens=rng.choice([8, 16, 60]),
        prefix_caching=rng.random() < 0.7,
    )
    arrivals = [
        (p, SamplingParams(max_tokens=rng.randint(1, 30), n=1, spec=rng.choice([None, 0, 2])))
        for p in prompts(6, seed)
    ]
    outputs = run(engine, arrivals, seed)
    for i, (prompt, params) in enumerate(arrivals):
        assert outputs[str(i)] == expected(prompt, params.max_tokens or 0, i, stops=(7, 8)), i


def test_a_draft_never_preempts_and_takes_the_last_slots_of_a_page() -> None:
    engine = make_engine(num_pages=2, drafts=Speculator(FixedController(8), Knowing(truth, 1.0)))
    engine.add("0", [1, 2, 3], SamplingParams(max_tokens=5))
    drafts = []
    while engine.has_work:
        engine.step()
        drafts += [len(entry.draft) for entry in engine.last_step.scheduled if entry.sample]  # type: ignore[union-attr]
    assert drafts == [0, 3], (
        "eight slots in all: one known token and three drafts, and the fourth is the bonus"
    )
    assert engine.stats.preemptions == 0


def test_a_length_of_a_requests_own() -> None:
    engine = make_engine(num_pages=64, drafts=Speculator(FixedController(2), Knowing(truth, 1.0)))
    lengths: dict[str, set[int]] = {}
    for i, spec in enumerate([None, 0, 5]):
        engine.add(str(i), [1, 2, 3], SamplingParams(max_tokens=40, spec=spec), seed=i)
    while engine.has_work:
        engine.step()
        for entry in engine.last_step.scheduled:  # type: ignore[union-attr]
            if entry.start >= 4 and entry.start < 20:
                lengths.setdefault(entry.id, set()).add(len(entry.draft))
    assert lengths == {"0": {2}, "1": {0}, "2": {5}}
    with pytest.raises(RequestError, match="spec must be between 0 and 16"):
        SamplingParams(spec=17)


def test_without_speculation_a_step_has_no_drafts_and_no_counters() -> None:
    engine = make_engine()
    engine.add("0", [1, 2, 1, 2, 1], SamplingParams(max_tokens=9, spec=0))
    run_off = []
    while engine.has_work:
        engine.step()
        run_off += [(entry.num_tokens, entry.draft, entry.keep_pages) for entry in engine.last_step.scheduled]  # type: ignore[union-attr]
    assert run_off == [(5, (), ()), *[(1, (), ())] * 8]
    assert engine.stats.spec is None


def test_layers_with_a_state_are_not_speculated_on() -> None:
    """What they hold of wrong tokens cannot be taken back."""
    kv_group = group(4)
    state = LayerCacheSpec(2, 0, 0, 0, 4, kind="recurrent", state_bytes=512)
    allocator = UniformAllocator(replace(kv_group, layers=(*kv_group.layers, state)), 40)
    drafts = Speculator(FixedController(4), Knowing(truth, 1.0))
    scheduler = Scheduler(SchedulerConfig(8, 16, 64), allocator, (), drafts)
    engine = Engine(scheduler, MemoryExecutor(kv_group), VirtualClock())
    engine.add("0", [1, 2, 3], SamplingParams(max_tokens=12))
    while engine.has_work:
        engine.step()
        assert not any(entry.draft for entry in engine.last_step.scheduled)  # type: ignore[union-attr]
    assert engine.stats.spec is None
    with pytest.raises(RequestError, match="keep a state") as refused:
        engine.add("1", [1, 2, 3], SamplingParams(spec=1))
    assert refused.value.param == "spec"


def test_drafts_that_nobody_makes_are_refused_not_ignored() -> None:
    engine = make_engine()
    with pytest.raises(
        RequestError, match="spec asks for 4 draft tokens, but this server makes none"
    ) as refused:
        engine.add("0", [1, 2, 1, 2], SamplingParams(spec=4))
    assert refused.value.param == "spec" and refused.value.http_status == 400 and not engine.has_work
    with pytest.raises(RequestError, match="A beam search takes no drafts"):
        SamplingParams(temperature=0, spec=2, beam=BeamParams(2))
    engine.add("0", [1, 2, 1, 2], SamplingParams(max_tokens=3, spec=0))
    SamplingParams(temperature=0, spec=0, beam=BeamParams(2))


def test_answers_that_share_pages_and_beams_beside_them() -> None:
    """Forks share the last page of a prompt: a draft's writes must not reach it."""
    for chance in (0.0, 0.5, 1.0):
        engine = make_engine(
            num_pages=60, drafts=Speculator(FixedController(4), Knowing(lambda t, s: 5, chance))
        )
        plain = make_engine(num_pages=60)
        outputs = []
        for e in (engine, plain):
            got: dict[tuple[str, int], list[int]] = {}
            e.add("0", [3, 1, 4, 1, 5, 9], SamplingParams(max_tokens=14, n=3), seed=1)
            e.add("1", [2, 7, 1, 8], SamplingParams(max_tokens=8, temperature=0, n=2, beam=BeamParams(3)))
            while e.has_work:
                for output in e.step():
                    got.setdefault((output.request_id, output.index), []).extend(output.token_ids)
                e.scheduler.check()
            outputs.append(got)
        assert outputs[0] == outputs[1]


@pytest.mark.parametrize("make", [AutoController, lambda: FixedController(3)])
def test_a_recorded_run_replays_bit_for_bit(make: object, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with path.open("w") as file:
        engine = make_engine(num_pages=22, drafts=Speculator(make(), Knowing(truth, 0.7)))  # type: ignore[operator]
        engine = Engine(
            engine.scheduler, engine.executor, VirtualClock(), StepLogWriter(file, engine.scheduler)
        )
        run(engine, [(p, SamplingParams(max_tokens=20)) for p in prompts(8, 3)])
    again = replay(path)
    assert again.mismatch is None and again.steps == engine.stats.steps
    assert engine.stats.spec.draft_tokens > 0  # type: ignore[union-attr]


def test_the_same_run_decides_the_same() -> None:
    logs = []
    for _ in range(2):
        file = io.StringIO()
        proposer: Proposer = SuffixProposer()
        controller: Controller = AutoController()
        engine = make_engine(num_pages=40, drafts=Speculator(controller, proposer))
        engine = Engine(
            engine.scheduler, engine.executor, VirtualClock(), StepLogWriter(file, engine.scheduler)
        )
        run(engine, [([1, 2, 3, 4] * 3 + [i], SamplingParams(max_tokens=20)) for i in range(8)])
        logs.append(file.getvalue())
    assert logs[0] == logs[1]


def test_an_abort_in_the_middle_forgets_the_sequence() -> None:
    proposer = Knowing(truth, 0.5, wrong=lambda token: (token + 1) % VOCAB)
    engine = make_engine(drafts=Speculator(FixedController(4), proposer))
    for i in range(3):
        engine.add(str(i), [1, 2, 3, i], SamplingParams(max_tokens=30), seed=i)
    got: dict[str, list[int]] = {}
    for step in range(100):
        if step == 3:
            engine.abort("1")
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
    assert not proposer.tokens and not engine.has_work
    for i in (0, 2):
        assert got[str(i)] == expected([1, 2, 3, i], 30, i)


class _Failing(MemoryExecutor):
    def submit(self, out: SchedulerOutput) -> None:
        if any(entry.draft for entry in out.scheduled):
            self.failing = {"1"}
        super().submit(out)


def test_a_sequence_that_fails_with_drafts_leaves_the_others_alone() -> None:
    engine = make_engine(drafts=Speculator(FixedController(4), Knowing(truth, 1.0)))
    executor = _Failing(engine.scheduler.allocator.groups[0])
    engine = Engine(engine.scheduler, executor, VirtualClock())
    for i in range(2):
        engine.add(str(i), [1, 2, 3, i], SamplingParams(max_tokens=20), seed=i)
    got: dict[str, list[int]] = {}
    errors = []
    while engine.has_work:
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
            errors += [output.error] if output.error else []
        engine.scheduler.check()
    assert got["0"] == expected([1, 2, 3, 0], 20, 0) and errors == ["it was told to fail"]
