"""Trees of drafts through the real engine, in float32: whatever branches they have, every request gets the tokens
and logprobs that it gets without, and keys and values of the path that was right lie where they belong."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmtool_kernels.attention import KVLayout, move_tokens, page_rows, store_rows
from transformers import LlamaConfig, LlamaForCausalLM

from llmtool.core.engine import Engine
from llmtool.core.ports import VirtualClock
from llmtool.core.request import Grammar, SamplingParams
from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.controllers import Controller, FixedController, SmartSpecController
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.speculation.suffix import SuffixProposer
from llmtool.core.steplog import StepLogWriter, replay
from llmtool.models.cpu_decoder import CpuDecoder
from llmtool.models.loader import load
from tests.core.speculation.bushes import Bushy
from tests.runtime.test_engine_equality import CONDITIONS, conversations, make_engine
from tests.runtime.test_executor import compiler
from tests.runtime.test_speculation import PARAMS, Outputs, Work, repeating, run, speculating
from tests.runtime.tiny import EOS, MAX_LEN, VOCAB, TinyModel

CONTROLLERS: dict[str, Callable[[], Controller]] = {
    "1": lambda: FixedController(1),
    "3": lambda: FixedController(3),
    "16": lambda: FixedController(16),
    "smartspec": SmartSpecController,
    "auto": AutoController,
}


def bushy(outputs: Outputs, work: Work, chance: float, seed: int) -> Bushy:
    rng = random.Random(seed)
    known = {str(i): prompt + outputs[str(i), 0] for i, (prompt, _) in enumerate(work)}

    def truth(tokens: list[int], seq: str) -> int:
        whole = known[seq.split("/")[0]]
        return whole[len(tokens)] if len(tokens) < len(whole) else EOS

    return Bushy(truth, chance, lambda token: rng.choice([(token + 1) % VOCAB, EOS, VOCAB - 1]), seed)  # type: ignore[arg-type]


class Watched(Speculator):
    """Counts drafts that were right though they lie on no first branch."""

    moved = 0

    def record(self, out, result) -> None:  # type: ignore[no-untyped-def]
        for entry, tokens in zip(out.scheduled, result.tokens, strict=True):
            path = entry.parents and [i for i, parent in enumerate(entry.parents) if parent == i - 1]
            chain = next((i for i, p in enumerate(path) if p != i), len(path)) if path else 0
            right = sum(1 for a, b in zip(entry.draft[:chain], tokens, strict=False) if a == b)
            self.moved += bool(entry.parents) and len(tokens) - 1 > right
        super().record(out, result)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_kind_of_sampling(tiny: TinyModel, params: str, controller: str) -> None:
    prompts = conversations(8, 3)
    work = [(p, SamplingParams(max_tokens=10 + 4 * i, **PARAMS[params])) for i, p in enumerate(prompts)]
    plain = run(make_engine(tiny, eos=[EOS]), work)
    for chance in (0.0, 0.6):
        drafts = Watched(CONTROLLERS[controller](), bushy(plain.tokens, work, chance, 1))
        engine = speculating(make_engine(tiny, eos=[EOS], budget=150), drafts)
        drafted = run(engine, work)
        assert drafted.tokens == plain.tokens
        assert {k: o.finish_reason for k, o in drafted.last.items()} == {
            k: o.finish_reason for k, o in plain.last.items()
        }
        for key, theirs in plain.logprobs.items():
            assert [p.token for p in drafted.logprobs[key]] == [p.token for p in theirs]
            ours = [p.logprob for p in drafted.logprobs[key]]
            assert ours == pytest.approx([p.logprob for p in theirs], abs=2e-5)
        spec = engine.stats.spec
        assert spec is not None and spec.accepted_tokens <= spec.draft_tokens
        if controller in ("3", "16"):
            assert drafts.moved > 0, "a branch was right where the draft was not"


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("controller", ["3", "auto"])
def test_whatever_happens_to_pages(tiny: TinyModel, condition: str, controller: str) -> None:
    rng = random.Random(7)
    work = [
        (p, SamplingParams(max_tokens=rng.randint(1, 40), temperature=i % 2))
        for i, p in enumerate(repeating(12, 5))
    ]
    plain = run(make_engine(tiny), work)
    for proposer in (SuffixProposer(branches=4), bushy(plain.tokens, work, 0.6, 2)):
        engine = make_engine(tiny, **CONDITIONS[condition])
        engine = speculating(engine, Speculator(CONTROLLERS[controller](), proposer))
        assert run(engine, work, seed=1).tokens == plain.tokens


def test_structured_output(tiny: TinyModel) -> None:
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
    for k in (2, 16):
        drafted = speculating(engine(), Speculator(FixedController(k), bushy(plain.tokens, work, 0.6, k)))
        assert run(drafted, work).tokens == plain.tokens


def test_a_recorded_run_replays(tiny: TinyModel, tmp_path: Path) -> None:
    work = [(p, SamplingParams(max_tokens=20, temperature=0)) for p in conversations(5, 4)]
    plain = run(make_engine(tiny), work)
    path = tmp_path / "run.jsonl"
    with path.open("w") as file:
        drafts = Watched(FixedController(4), bushy(plain.tokens, work, 0.6, 5))
        engine = speculating(make_engine(tiny, budget=60), drafts)
        log = StepLogWriter(file, engine.scheduler)
        engine = Engine(engine.scheduler, engine.executor, VirtualClock(), log)
        assert run(engine, work).tokens == plain.tokens
    assert drafts.moved > 0
    again = replay(path)
    assert again.mismatch is None and again.steps == engine.stats.steps


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """With heads that the CPU's operations keep in tiles."""
    directory = tmp_path_factory.mktemp("tiled")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(directory)
    return TinyModel(load(directory, torch.float32), reference, directory)


def test_keys_and_values_in_tiles(tiled: TinyModel) -> None:
    if not isinstance(tiled.decoder, CpuDecoder):
        pytest.skip("there are no C++ kernels here")
    work = [(p, SamplingParams(max_tokens=40, temperature=i % 2)) for i, p in enumerate(conversations(6, 3))]
    plain = run(make_engine(tiled, tokens_per_page=16), work)
    assert tiled.decoder.tiled == {0, 1}
    drafts = Watched(FixedController(5), bushy(plain.tokens, work, 0.6, 1))
    engine = speculating(make_engine(tiled, tokens_per_page=16, budget=150), drafts)
    assert run(engine, work).tokens == plain.tokens
    assert drafts.moved > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_tokens_are_those_that_were_stored(dtype: torch.dtype) -> None:
    """In rows; and tiles against a copy element by element after the layout's definition."""
    layout, heads, dim, size = KVLayout(512, 16, 2, 8, 32, None), 2, 8, 16
    arena = torch.zeros(1 << 16, dtype=torch.uint8)
    k, v = torch.randn(3, heads, dim).to(dtype), torch.randn(3, heads, 32).to(dtype)
    at = torch.tensor([0, 0, 20]), torch.tensor([3, 9, 0])
    to = torch.tensor([20, 0, 0]), torch.tensor([15, 3, 9])  # what is written over is read before
    store_rows(k, v, arena, layout, *at)
    move_tokens(arena, layout, dtype, False, *at, *to)
    for pages, values in zip(page_rows(arena, layout, dtype), (k, v), strict=True):
        rows = pages.unflatten(1, (size, -1))
        assert torch.equal(rows[to], values.flatten(1))
    arena = torch.randint(0, 60, (1 << 16,), dtype=torch.uint8)
    before, pair = arena.clone(), 4 // dtype.itemsize
    move_tokens(arena, layout, dtype, True, *at, *to)
    expected, source = before.clone(), before.view(dtype)
    target = expected.view(dtype)
    for (u, s), (w, t) in zip(zip(*at, strict=True), zip(*to, strict=True), strict=True):
        for head in range(heads):

            def key(unit: int, slot: int, d: int, head: int = head) -> int:
                tile = (
                    ((head * size + slot // 16 * 16) * dim)
                    + d // pair * 16 * pair
                    + slot % 16 * pair
                    + d % pair
                )
                return (unit * 512 + 512) // dtype.itemsize + tile

            def value(unit: int, slot: int, d: int, head: int = head) -> int:
                tile = (head * size + slot // pair * pair) * 32 + d * pair + slot % pair
                return (unit * 512 + 512) // dtype.itemsize + size * heads * dim + tile

            for place, width in ((key, dim), (value, 32)):
                for d in range(width):
                    target[place(int(w), int(t), d)] = source[place(int(u), int(s), d)]
    assert torch.equal(arena, expected)
