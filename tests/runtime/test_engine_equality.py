"""The whole engine, policy and torch executor, against transformers' generate: whatever the scheduler does to a
request (chunks, prefix hits, forks, preemption by recompute or swap), its tokens are those it would get alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtool.config import SchedulerConfig
from llmtool.core.admission import sibling_seed
from llmtool.core.engine import Engine
from llmtool.core.memory.select import make_allocator
from llmtool.core.ports import RealClock, VirtualClock
from llmtool.core.request import BeamParams, FinishReason, Grammar, SamplingParams, SequenceOutput
from llmtool.core.scheduler import Scheduler
from llmtool.core.steplog import StepLogWriter, replay
from tests.runtime.tiny import EOS, MAX_LEN, Script, TinyModel, random_prompts


def make_engine(
    tiny: TinyModel,
    *,
    num_pages: int = 200,
    host_pages: int = 0,
    tokens_per_page: int = 4,
    budget: int = 16,
    seqs: int = 6,
    preemption: str = "recompute",
    prefix_caching: bool = True,
    eos: Sequence[int] = (),
    plan: str = "uniform",
) -> Engine:
    pages = tiny.plan(tokens_per_page, plan)
    executor = tiny.executor(tokens_per_page, num_pages, host_pages=host_pages, max_num_seqs=seqs, plan=pages)
    allocator = make_allocator(pages or executor.store.group, num_pages, host_pages, prefix_caching, budget)
    config = SchedulerConfig(
        max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=MAX_LEN, preemption=preemption
    )
    return Engine(Scheduler(config, allocator, eos), executor, VirtualClock())


class Collector:
    """Tokens and last outputs by (request, index)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.last: dict[tuple[str, int], SequenceOutput] = {}

    def step(self) -> None:
        for output in self.engine.step():
            key = (output.request_id, output.index)
            self.tokens.setdefault(key, []).extend(output.token_ids)
            self.last[key] = output

    def drain(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work
        assert all(output.finish_reason is not None for output in self.last.values())
        assert all(output.error is None for output in self.last.values())
        self.engine.scheduler.allocator.check()
        assert self.engine.scheduler.allocator.ledger().pages_used == 0
        assert not self.engine.executor._sequences.row_of  # type: ignore[attr-defined]


def conversations(count: int, seed: int) -> list[list[int]]:
    """Prompts of which many begin alike, so that prefix hits of all lengths happen."""
    rng = random.Random(seed)
    stems = random_prompts(3, seed, low=9, high=24)
    tails = random_prompts(count, seed + 1, low=1, high=16)
    return [rng.choice(stems)[: rng.randint(4, 24)] + tail if rng.random() < 0.7 else tail for tail in tails]


CONDITIONS: dict[str, dict[str, Any]] = {
    "plenty": {},
    "no prefix cache": {"prefix_caching": False},
    "one token a page, tiny budget": {"tokens_per_page": 1, "num_pages": 700, "budget": 6},
    "large pages": {"tokens_per_page": 16, "num_pages": 60, "budget": 33},
    "recompute": {"num_pages": 26},
    "recompute, no prefix cache": {"num_pages": 26, "prefix_caching": False},
    "swap": {"num_pages": 26, "host_pages": 100, "preemption": "swap"},
    "swap with little room": {"num_pages": 26, "host_pages": 9, "preemption": "swap"},
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_generate(tiny: TinyModel, condition: str, seed: int) -> None:
    engine = make_engine(tiny, **CONDITIONS[condition])
    collector = Collector(engine)
    rng = random.Random(seed)
    prompts = conversations(16, seed)
    lengths = [rng.randint(1, 40) for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=lengths[i]))
        for _ in range(rng.randint(0, 4)):
            collector.step()
    collector.drain()
    for i, prompt in enumerate(prompts):
        assert collector.tokens[str(i), 0] == tiny.greedy(prompt, lengths[i]), i
    stats = engine.stats
    if CONDITIONS[condition].get("num_pages") == 26:
        assert stats.preemptions > 0
        assert (stats.swapped_pages > 0) == ("swap" in condition)
    if CONDITIONS[condition].get("prefix_caching", True):
        assert stats.prefix_hits > 0


def alone(tiny: TinyModel, prompt: list[int], params: SamplingParams, seed: int, count: int) -> list[int]:
    script = Script(tiny.executor(num_pages=60))
    script.add("x", prompt, params, seed)
    script.run(["x"], count)
    return script.live["x"].output


@pytest.mark.parametrize("condition", ["plenty", "recompute", "swap", "swap with little room"])
def test_sampled_answers_are_those_of_each_seed_alone(tiny: TinyModel, condition: str) -> None:
    """n > 1: siblings share the prompt's pages, and still each answer depends on its own seed only."""
    engine = make_engine(tiny, **CONDITIONS[condition])
    collector = Collector(engine)
    rng = random.Random(3)
    prompts = conversations(6, 8)
    params = [
        SamplingParams(temperature=0.9, n=n, max_tokens=18, top_p=p, presence_penalty=q)
        for n, p, q in (
            (3, 1.0, 0.0),
            (1, 0.9, 0.0),
            (4, 0.8, 0.5),
            (2, 1.0, 1.0),
            (3, 0.5, 0.0),
            (5, 1.0, 0.0),
        )
    ]
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        engine.add(str(i), prompt, p, seed=1000 + i)
        for _ in range(rng.randint(0, 3)):
            collector.step()
    collector.drain()
    assert len(collector.tokens) == sum(p.n for p in params)
    for (request, index), tokens in collector.tokens.items():
        i = int(request)
        assert tokens == alone(tiny, prompts[i], params[i], sibling_seed(1000 + i, index), 18)
    assert engine.stats.copied_pages > 0
    if condition != "plenty":
        assert engine.stats.preemptions > 0


@pytest.mark.parametrize("num_pages", [200, 30])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_beam_search_equals_generate(tiny: TinyModel, num_pages: int, length_penalty: float) -> None:
    engine = make_engine(tiny, num_pages=num_pages, eos=[EOS])
    collector = Collector(engine)
    prompts = conversations(4, 21)
    params = SamplingParams(temperature=0, n=2, max_tokens=12, beam=BeamParams(3, length_penalty))
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
        collector.step()
    collector.drain()
    for i, prompt in enumerate(prompts):
        theirs = tiny.generate(
            prompt,
            max_new_tokens=12,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=length_penalty,
            do_sample=False,
            eos_token_id=EOS,
        )
        for index in range(2):
            ours = collector.tokens[str(i), index]
            assert ours == theirs[index][: len(ours)]
            assert set(theirs[index][len(ours) :]) <= {299}, "only padding follows"


def test_prompt_logprobs_come_whole_through_prefix_hits_and_preemption(tiny: TinyModel) -> None:
    engine = make_engine(tiny, num_pages=26, budget=7)
    prompts = conversations(8, 31)
    first: dict[str, SequenceOutput] = {}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0 if i % 2 else None)
        engine.add(str(i), prompt, params)
    while engine.has_work:
        for output in engine.step():
            first.setdefault(output.request_id, output)
    for i, prompt in enumerate(prompts):
        given = first[str(i)].prompt_logprobs
        if i % 2 == 0:
            assert not given
            continue
        reference = tiny.logprobs(prompt)
        assert given[0] is None
        assert [p.token for p in given[1:] if p] == prompt[1:]
        got = [p.logprob for p in given[1:] if p]
        assert got == pytest.approx([reference[j, t].item() for j, t in enumerate(prompt[1:])], abs=1e-4)
    assert engine.stats.preemptions > 0


def test_aborts_at_any_moment_leave_the_others_alone(tiny: TinyModel) -> None:
    engine = make_engine(tiny, num_pages=26)
    collector = Collector(engine)
    rng = random.Random(5)
    prompts = conversations(14, 41)
    alive = set(range(14))
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=25))
        collector.step()
        if rng.random() < 0.5:
            victim = rng.choice(sorted(alive))
            for output in engine.abort(str(victim)):
                assert output.finish_reason == FinishReason.ABORT
                collector.last[output.request_id, output.index] = output
                alive.discard(victim)
    collector.drain()
    assert 0 < len(alive) < 14
    for i, prompt in enumerate(prompts):
        expected = tiny.greedy(prompt, 25)
        tokens = collector.tokens.get((str(i), 0), [])
        assert tokens == (expected if i in alive else expected[: len(tokens)])


def test_a_failing_sequence_does_not_spoil_pages_that_others_share(tiny: TinyModel) -> None:
    (prompt,) = random_prompts(1, 3, low=20, high=20)
    engine = make_engine(tiny, budget=64)
    collector = Collector(engine)
    # It fails before its first token, in the very step in which "good" and "later" find its pages in the cache.
    refused = SamplingParams(temperature=0, max_tokens=4, grammar=Grammar("regex", "(("))
    engine.add("bad", prompt, refused)
    engine.add("good", prompt, SamplingParams(temperature=0, max_tokens=8))
    while engine.has_work:
        collector.step()
    engine.add("later", prompt, SamplingParams(temperature=0, max_tokens=8))
    while engine.has_work:
        collector.step()
    assert collector.last["bad", 0].finish_reason == FinishReason.ERROR
    assert collector.tokens["good", 0] == collector.tokens["later", 0] == tiny.greedy(prompt, 8)
    assert collector.last["later", 0].num_cached_tokens == 16


@pytest.mark.parametrize("condition", ["recompute", "swap"])
def test_a_recorded_run_replays_bit_for_bit(tiny: TinyModel, condition: str, tmp_path: Path) -> None:
    path = tmp_path / "run.steplog.jsonl"
    engine = make_engine(tiny, **CONDITIONS[condition])
    with path.open("w") as file:
        engine = Engine(engine.scheduler, engine.executor, RealClock(), StepLogWriter(file, engine.scheduler))
        collector = Collector(engine)
        for i, prompt in enumerate(conversations(14, 5)):
            beam = BeamParams(3) if i % 5 == 4 else None
            params = SamplingParams(temperature=0 if beam else 1, max_tokens=12, n=1 + i % 3, beam=beam)
            engine.add(str(i), prompt, params, seed=i)
            collector.step()
            if i == 8:
                engine.abort("6")
        collector.drain()
    result = replay(path)
    assert result.mismatch is None
    assert result.steps == engine.stats.steps and engine.stats.preemptions > 0
