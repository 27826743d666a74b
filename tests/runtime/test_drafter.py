"""Models that draft: what they say is what they would say alone, however far behind they were, and the output
of the engine is what it is without them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmtool.core.memory.geometry import uniform_group
from llmtool.core.request import SamplingParams
from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.build import controller_of, model_of, speculator_of
from llmtool.core.speculation.controllers import FixedController
from llmtool.core.speculation.draft import NOTHING, Draft
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.speculation.suffix import SuffixProposer
from llmtool.errors import UsageError
from llmtool.models.decoder import Decoder
from llmtool.models.layer_mask import default_layers, layer_mask, parse_layers
from llmtool.runtime.drafter import ModelDrafter
from llmtool.runtime.kv_store import KVStore
from tests.runtime.test_engine_equality import CONDITIONS, conversations, make_engine
from tests.runtime.test_speculation import run, speculating
from tests.runtime.tiny import MAX_LEN, TinyModel, random_prompts


def drafter(
    model: Decoder, num_pages: int = 400, budget: int = 64, max_length: int = MAX_LEN
) -> ModelDrafter:
    group = uniform_group(model.spec.layer_cache_specs(4), 4)
    return ModelDrafter("draft", model, KVStore(group, num_pages), budget, max_length)


def test_it_says_what_the_model_says_whatever_was_accepted(tiny: TinyModel) -> None:
    rng = random.Random(0)
    own = drafter(tiny.decoder)
    known = {f"s{i}": list(p) for i, p in enumerate(random_prompts(5, 1))}
    for _ in range(12):
        some = sorted(rng.sample(sorted(known), rng.randint(1, 5)))
        lengths = [rng.randint(1, 6) for _ in some]
        drafts = own.draft(some, [known[s] for s in some], lengths)
        for seq, draft, length in zip(some, drafts, lengths, strict=True):
            assert draft == tiny.greedy(known[seq], length)
            right = rng.randint(0, length)
            known[seq] += [*draft[:right], rng.randrange(2, 290)]
    assert own.last_seconds > 0
    for seq in known:
        own.finish(seq)
    own.finish("never seen")
    assert own.pages_used == 0


def test_a_long_way_behind_it_catches_up_over_several_steps(tiny: TinyModel) -> None:
    own = drafter(tiny.decoder, budget=10)
    prompt = random_prompts(1, 2, low=35, high=35)[0]
    drafts = [own.draft(["a"], [prompt], [3])[0] for _ in range(5)]
    assert drafts[:3] == [[], [], []] and drafts[3] == drafts[4] == tiny.greedy(prompt, 3)


def test_without_pages_it_lets_go_of_whom_it_does_not_draft_for(tiny: TinyModel) -> None:
    own = drafter(tiny.decoder, num_pages=10)  # 40 tokens
    a, b = random_prompts(2, 3, low=30, high=30)
    assert own.draft(["a"], [a], [2]) == [tiny.greedy(a, 2)]
    assert own.draft(["b"], [b], [2]) == [tiny.greedy(b, 2)]
    assert own.draft(["a", "b"], [a, b], [2, 2]) in ([tiny.greedy(a, 2), []], [[], tiny.greedy(b, 2)])
    assert drafter(tiny.decoder, max_length=40).draft(["a"], [a], [2]) == [[]], "it was made for fewer tokens"


def test_a_layer_mask_shares_weights_and_is_the_model_without_those_layers(tiny: TinyModel) -> None:
    masked = layer_mask(tiny.decoder, [1])
    assert masked.spec.num_layers == 1
    theirs, ours = tiny.decoder.weights.layers[1], masked.weights.layers[0]  # type: ignore[attr-defined]
    assert theirs is ours
    reference = tiny.reference.model.layers
    own = drafter(masked)
    prompt = random_prompts(1, 4)[0]
    tiny.reference.model.layers = torch.nn.ModuleList([reference[1]])
    reference[1].self_attn.layer_idx = 0
    try:
        expected = tiny.greedy(prompt, 4)
    finally:
        reference[1].self_attn.layer_idx = 1
        tiny.reference.model.layers = reference
    assert own.draft(["a"], [prompt], [4]) == [expected]
    assert layer_mask(tiny.decoder, [0, 1]).spec == tiny.decoder.spec
    for bad in ([], [2], [1, 0], [-1]):
        with pytest.raises(UsageError, match="ascending and between 0 and 1"):
            layer_mask(tiny.decoder, bad)


@pytest.mark.parametrize("condition", ["plenty", "recompute", "swap", "one token a page, tiny budget"])
@pytest.mark.parametrize("kind", ["same", "pruned", "union"])
def test_output_is_that_without_it(tiny: TinyModel, kind: str, condition: str) -> None:
    rng = random.Random(3)
    work = [
        (p, SamplingParams(max_tokens=rng.randint(1, 30), temperature=i % 2))
        for i, p in enumerate(conversations(9, 4))
    ]
    plain = run(make_engine(tiny), work)
    for controller in (FixedController(1), FixedController(4), AutoController()):
        own = drafter(tiny.decoder if kind == "same" else layer_mask(tiny.decoder, [0]), budget=30)
        text = SuffixProposer() if kind == "union" else None
        engine = speculating(make_engine(tiny, **CONDITIONS[condition]), Speculator(controller, text, own))
        assert run(engine, work, seed=2).tokens == plain.tokens
        assert own.pages_used == 0 or not engine.has_work
        spec = engine.stats.spec
        assert spec is not None and (spec.draft_tokens > 0 or isinstance(controller, AutoController))
        if kind == "same" and isinstance(controller, FixedController):
            assert spec.accepted_tokens > 0.3 * spec.draft_tokens


def test_who_has_a_draft_from_text_needs_none_from_the_model(tiny: TinyModel) -> None:
    asked: list[list[str]] = []

    class Model:
        name = "draft"
        last_seconds = 0.001

        def draft(
            self, seqs: Sequence[str], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
        ) -> list[list[int]]:
            asked.append(list(seqs))
            return [[5] * n for n in lengths]

        def finish(self, seq: str) -> None:
            pass

    class Text(SuffixProposer):
        def propose(self, seq: str, limit: int) -> Draft:
            return Draft([3] * min(2, limit), "suffix", 4) if seq == "0" and limit > 0 else NOTHING

    work = [(p, SamplingParams(max_tokens=8, temperature=0)) for p in conversations(2, 1)]
    engine = speculating(make_engine(tiny, budget=60), Speculator(FixedController(2), Text(), Model()))
    assert run(engine, work).tokens == run(make_engine(tiny), work).tokens
    assert asked and all(seqs == ["1"] for seqs in asked)


def test_settings_as_they_are_written(tmp_path: Path) -> None:
    assert model_of("suffix") is None
    assert model_of("draft:small") == ("draft", "small")
    assert model_of("pruned") == model_of("union") == ("pruned", "")
    assert model_of("pruned:0-3") == model_of("union:pruned:0-3") == ("pruned", "0-3")
    for bad in ("", "draft", "draft:", "eagle", "unions"):
        with pytest.raises(UsageError, match="no proposer"):
            model_of(bad)
    assert (
        controller_of("off") is None and controller_of("0") is None and speculator_of("off", "pruned") is None
    )
    assert [controller_of(s).name for s in ("auto", "smartspec", "3")] == ["auto", "smartspec", "3"]  # type: ignore[union-attr]
    table = tmp_path / "k.toml"
    table.write_text("1 = 5\n8 = 2\n")
    assert controller_of(str(table)).name == "table"  # type: ignore[union-attr]
    for text in ("1 = 99", "x = 3", "1 = true", "= ="):
        table.write_text(text)
        with pytest.raises(UsageError):
            controller_of(str(table))
    for bad in ("17", "-1", "sometimes"):
        with pytest.raises(UsageError):
            controller_of(bad)
    assert parse_layers("0-2,5", 6) == [0, 1, 2, 5]
    for bad in ("", "a", "0-", "4-9", "7"):
        with pytest.raises(UsageError):
            parse_layers(bad, 6)
    assert default_layers(30) == [*range(12), 27, 28, 29] and default_layers(1) == [0]
