"""Speculation through the real engine, in float32: every request gets the tokens and logprobs that it gets without,
whatever is drafted, and its keys and values are those of a fresh computation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from llmtool_kernels.attention import UNIT

from llmtool.core.engine import Engine
from llmtool.core.ports import Drafts
from llmtool.core.request import Grammar, SamplingParams, TokenLogprob
from llmtool.core.scheduler import Scheduler
from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.controllers import Controller, FixedController, SmartSpecController
from llmtool.core.speculation.draft import Proposer
from llmtool.core.speculation.proposers import UnionProposer
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.speculation.suffix import SuffixProposer
from tests.core.speculation.drafters import Knowing
from tests.runtime.test_engine_equality import CONDITIONS, Collector, conversations, make_engine
from tests.runtime.test_executor import compiler
from tests.runtime.tiny import EOS, VOCAB, TinyModel

Work = Sequence[tuple[list[int], SamplingParams]]
Outputs = dict[tuple[str, int], list[int]]


def speculating(engine: Engine, drafts: Drafts | None) -> Engine:
    """The same engine with speculation."""
    s = engine.scheduler
    return Engine(
        Scheduler(s.config, s.allocator, sorted(s.eos_token_ids), drafts), engine.executor, engine.clock
    )


class Logged(Collector):
    """Logprobs too."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.logprobs: dict[tuple[str, int], list[TokenLogprob]] = {}

    def step(self) -> None:
        for output in self.engine.step():
            key = (output.request_id, output.index)
            self.tokens.setdefault(key, []).extend(output.token_ids)
            self.logprobs.setdefault(key, []).extend(output.logprobs)
            self.last[key] = output


def run(engine: Engine, work: Work, seed: int = 0) -> Logged:
    collector = Logged(engine)
    rng = random.Random(seed)
    for i, (prompt, params) in enumerate(work):
        engine.add(str(i), prompt, params, seed=100 + i)
        for _ in range(rng.randint(0, 3)):
            collector.step()
    collector.drain()
    return collector


def knowing(
    outputs: Outputs, work: Sequence[tuple[list[int], SamplingParams]], chance: float, seed: int
) -> Knowing:
    """Drafts what was said without speculation, with that chance; else anything, also what is no token."""
    rng = random.Random(seed)
    known = {str(i): prompt + outputs[str(i), 0] for i, (prompt, _) in enumerate(work)}

    def truth(tokens: Sequence[int], seq: str) -> int:
        whole = known[seq.split("/")[0]]
        return whole[len(tokens)] if len(tokens) < len(whole) else EOS

    def wrong(token: int) -> int:
        return rng.choice([(token + 1) % VOCAB, EOS, VOCAB - 1])

    return Knowing(truth, chance, wrong, seed)


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
    },
    "greedy penalties": {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.7},
    "bias and min_tokens": {"temperature": 1.0, "logit_bias": {EOS: 6.0, 5: 3.0}, "min_tokens": 9},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
}


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("k", [1, 3, 5, 8, 16])
def test_every_kind_of_sampling(tiny: TinyModel, params: str, k: int) -> None:
    prompts = conversations(8, 3)
    work = [(p, SamplingParams(max_tokens=10 + 4 * i, **PARAMS[params])) for i, p in enumerate(prompts)]
    plain = run(make_engine(tiny, eos=[EOS]), work)
    for chance in (0.0, 0.7, 1.0):
        proposer = knowing(plain.tokens, work, chance, k)
        engine = speculating(
            make_engine(tiny, eos=[EOS], budget=100), Speculator(FixedController(k), proposer)
        )
        drafted = run(engine, work)
        assert drafted.tokens == plain.tokens
        spec = engine.stats.spec
        assert spec is not None and spec.draft_tokens > 0
        if "bias" not in params:  # there some drafts go on past an end of sequence, and nothing is emitted
            assert (spec.accepted_tokens == spec.draft_tokens) == (chance == 1)
        assert {k: o.finish_reason for k, o in drafted.last.items()} == {
            k: o.finish_reason for k, o in plain.last.items()
        }
        for key, theirs in plain.logprobs.items():
            ours = drafted.logprobs[key]
            assert [(p.token, p.rank, [t for t, _ in p.top]) for p in ours] == [
                (p.token, p.rank, [t for t, _ in p.top]) for p in theirs
            ]
            assert [p.logprob for p in ours] == pytest.approx([p.logprob for p in theirs], abs=2e-5)


CONTROLLERS: dict[str, Callable[[], Controller]] = {
    "1": lambda: FixedController(1),
    "5": lambda: FixedController(5),
    "16": lambda: FixedController(16),
    "smartspec": SmartSpecController,
    "auto": AutoController,
}


def repeating(count: int, seed: int) -> list[list[int]]:
    """Prompts that say things twice."""
    rng = random.Random(seed)
    return [prompt[:9] + prompt[: rng.randint(0, 8)] for prompt in conversations(count, seed)]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_controller_whatever_happens_to_pages(tiny: TinyModel, condition: str, controller: str) -> None:
    rng = random.Random(7)
    work = [
        (p, SamplingParams(max_tokens=rng.randint(1, 40), temperature=i % 2))
        for i, p in enumerate(repeating(12, 5))
    ]
    plain = run(make_engine(tiny), work)
    proposers: list[Proposer] = [SuffixProposer(), knowing(plain.tokens, work, 0.8, 1)]
    for proposer in (*proposers, UnionProposer([SuffixProposer(), knowing(plain.tokens, work, 0.3, 2)])):
        engine = speculating(
            make_engine(tiny, **CONDITIONS[condition]), Speculator(CONTROLLERS[controller](), proposer)
        )
        assert run(engine, work, seed=1).tokens == plain.tokens


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_answers_of_one_request_share_pages_that_drafts_do_not_spoil(tiny: TinyModel, batch: int) -> None:
    work = [(p, SamplingParams(max_tokens=15, n=3, temperature=1)) for p in conversations(batch, 2)]
    plain = run(make_engine(tiny), work)
    engine = speculating(
        make_engine(tiny, budget=60), Speculator(FixedController(4), knowing(plain.tokens, work, 0.6, 3))
    )
    assert run(engine, work).tokens == plain.tokens


def test_structured_output_with_drafts_that_break_it(tiny: TinyModel) -> None:
    grammar = Grammar("regex", "(ab|cd)+e{1,4}")
    work = [
        (p, SamplingParams(max_tokens=30, temperature=1, grammar=grammar if i % 2 else None))
        for i, p in enumerate(conversations(6, 9))
    ]

    def engine() -> Engine:
        made = make_engine(tiny, eos=[EOS], budget=100)
        made.executor._make_compiler = compiler  # type: ignore[attr-defined]
        return made

    plain = run(engine(), work)
    for k in (1, 4, 16):
        for chance in (0.0, 0.6, 1.0):
            drafted = speculating(
                engine(), Speculator(FixedController(k), knowing(plain.tokens, work, chance, k))
            )
            assert run(drafted, work).tokens == plain.tokens
            assert drafted.stats.spec.draft_tokens > 0  # type: ignore[union-attr]


def test_keys_and_values_after_random_verdicts_are_those_of_a_fresh_computation(tiny: TinyModel) -> None:
    (prompt,) = conversations(1, 8)
    work = [(prompt, SamplingParams(max_tokens=60, temperature=0))]
    plain = run(make_engine(tiny), work)
    whole = prompt + plain.tokens["0", 0]

    def content(engine: Engine, length: int) -> torch.Tensor:
        """[layers * length, K and V, width] of the only sequence, read through its table."""
        store = engine.executor.store  # type: ignore[attr-defined]
        table = engine.scheduler.allocator.table("0")[0]
        size = store.group.tokens_per_page
        rows = []
        for layout in store.layouts().values():
            width = layout.num_kv_heads * layout.k_head_dim  # of K, and of V here
            for position in range(length):
                page = store.arena[table[position // size] * UNIT + layout.layer_offset :]
                floats = page[: 2 * size * width * 4].view(torch.float32).view(2, size, width)
                rows.append(floats[:, position % size])
        return torch.stack(rows)

    engine = speculating(
        make_engine(tiny, budget=60), Speculator(FixedController(5), knowing(plain.tokens, work, 0.7, 4))
    )
    engine.add("0", *work[0], seed=100)
    size = engine.executor.store.group.tokens_per_page  # type: ignore[attr-defined]
    rejected = 0
    while engine.has_work and (engine.last_step is None or len(content_length(engine)) < len(whole) - 12):
        engine.step()
        state = engine.scheduler.allocator._seqs["0"]  # type: ignore[attr-defined]
        assert len(state.pages) == -(-state.length // size), "no page past the last certain token"
        step = engine.last_step
        rejected += bool(step and step.scheduled[0].draft and state.length < step.scheduled[0].start + 6)
    assert rejected > 2
    length = len(content_length(engine)) - 1
    fresh = make_engine(tiny, budget=200)
    fresh.add("0", whole[: length + 1], SamplingParams(max_tokens=5, temperature=0))
    fresh.step()
    torch.testing.assert_close(content(engine, length), content(fresh, length), rtol=1e-4, atol=1e-5)


def content_length(engine: Engine) -> Sequence[int]:
    state = engine.scheduler.allocator._seqs.get("0")  # type: ignore[attr-defined]
    return state.token_ids if state is not None else ()
