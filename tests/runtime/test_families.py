"""Every family, and models that run through transformers, in the whole engine against transformers' generate,
whatever the scheduler does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmtool.core.engine import Engine
from llmtool.core.memory.tables import PlanPages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.core.request import SamplingParams
from llmtool.core.speculation.controllers import FixedController
from llmtool.core.speculation.speculator import Speculator
from llmtool.models.loader import load
from tests.models.conftest import FAMILIES, build
from tests.models.foreign import RUNS, save
from tests.models.paged import PagedSequences
from tests.runtime.test_engine_equality import Collector, conversations, make_engine
from tests.runtime.test_speculation import knowing, speculating
from tests.runtime.tiny import MAX_LEN, VOCAB, TinyModel

# transformers turns the keys of its cache anew where a context outgrows longrope's short factors, and no engine
# with shared pages can: within one set of factors both agree.
NAMES = [*sorted(set(FAMILIES) - {"phi3-longrope-long"}), "gpt2", "cohere2"]
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": MAX_LEN, "num_hidden_layers": 2}
LONGEST = 64
CONDITIONS: dict[str, dict[str, Any]] = {
    "chunks, prefix hits and recomputation": {"num_pages": 20, "budget": 13},
    "large pages, swapping": {
        "tokens_per_page": 8,
        "num_pages": 11,
        "host_pages": 40,
        "budget": 40,
        "preemption": "swap",
    },
}
Expected = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[TinyModel, Expected]]:
    """name -> (the model here and in transformers, [(prompt, greedy tokens)]); built once."""
    built: dict[str, tuple[TinyModel, Expected]] = {}

    def get(name: str) -> tuple[TinyModel, Expected]:
        if name not in built:
            directory = tmp_path_factory.mktemp(name)
            if name in RUNS:
                layers = {"layer_types": RUNS[name]["layer_types"][:2]} if "layer_types" in RUNS[name] else {}
                reference = save(directory, name, {**RUNS[name], **SIZES, **layers})
            else:
                reference = build(name, **SIZES)
                reference.save_pretrained(directory)
            tiny = TinyModel(load(directory, torch.float32, max_length=LONGEST), reference, directory)
            rng = random.Random(len(name))
            answers = [(prompt, tiny.greedy(prompt, rng.randint(8, 20))) for prompt in conversations(10, 3)]
            assert max(len(prompt) + len(tokens) for prompt, tokens in answers) <= LONGEST
            built[name] = tiny, answers
        return built[name]

    return get


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_greedy_equals_generate(
    family: Callable[[str], tuple[TinyModel, Expected]], name: str, condition: str
) -> None:
    tiny, answers = family(name)
    engine = make_engine(tiny, **CONDITIONS[condition])
    check(engine, answers)
    stats = engine.stats
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert (stats.swapped_pages > 0) == ("swap" in condition)


# Families with layers that see a window, one of them through transformers' code.
WINDOWS = ["gemma2", "gemma3", "gpt-oss", "mistral-window", "phi3-window", "qwen2-window", "cohere2"]
LARGE: dict[str, dict[str, Any]] = {
    "plenty": {"budget": 16, "num_pages": 300},
    "chunks and recomputation": {"budget": 13},
    "swapping": {"host_pages": 60, "budget": 13, "preemption": "swap"},
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("plan", ["near", "lcm"])
@pytest.mark.parametrize("condition", LARGE)
def test_greedy_equals_generate_over_large_pages(
    family: Callable[[str], tuple[TinyModel, Expected]], name: str, plan: str, condition: str
) -> None:
    """Pages outside a window are given up, and given to others."""
    tiny, answers = family(name)
    pages = tiny.plan(4, plan)
    assert pages is not None
    # Little more than the longest sequence needs, unless the condition says otherwise.
    room = {"num_pages": PlanPages(pages, LARGE[condition]["budget"]).pages(LONGEST) * 5 // 4}
    engine = make_engine(tiny, plan=plan, **room | LARGE[condition])
    assert isinstance(engine.scheduler.allocator, TwoLevelAllocator)
    check(engine, answers)
    stats, keeps_all = engine.stats, None in tiny.decoder.spec.windows
    if condition == "plenty":
        assert stats.prefix_hits > 0 and stats.preemptions == 0
    elif keeps_all:  # a sequence that sees windows only hardly grows
        assert stats.preemptions > 0
        assert (stats.swapped_pages > 0) == (condition == "swapping")


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
@pytest.mark.parametrize("condition", LARGE)
def test_wrong_drafts_are_rolled_back_over_large_pages(
    family: Callable[[str], tuple[TinyModel, Expected]], name: str, condition: str
) -> None:
    """A window moves past tokens that stay, never past drafts: what is read after a rollback is still there."""
    tiny, answers = family(name)
    pages = tiny.plan(4, "near")
    assert pages is not None
    room = {"num_pages": PlanPages(pages, LARGE[condition]["budget"]).pages(LONGEST) * 5 // 4}
    outputs = {(str(i), 0): tokens for i, (_, tokens) in enumerate(answers)}
    proposer = knowing(outputs, [(prompt, SamplingParams()) for prompt, _ in answers], 0.6, 3)
    drafts = Speculator(FixedController(5), proposer)
    engine = speculating(make_engine(tiny, plan="near", **room | LARGE[condition]), drafts)
    check(engine, answers)
    spec = engine.stats.spec
    assert spec is not None and 0 < spec.accepted_tokens < spec.draft_tokens


def check(engine: Engine, answers: Expected) -> None:
    """All at once; every answer is the one it would get alone."""
    collector = Collector(engine)
    rng = random.Random(1)
    for i, (prompt, tokens) in enumerate(answers):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=len(tokens)))
        for _ in range(rng.randint(0, 2)):
            collector.step()
    collector.drain()
    for i, (_, tokens) in enumerate(answers):
        assert collector.tokens[str(i), 0] == tokens, i


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama-tiles", "mixtral", "deepseek-v3"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_fewer_bits_say_the_same_whatever_the_scheduler_does(
    family: Callable[[str], tuple[TinyModel, Expected]], name: str, quantization: str, condition: str
) -> None:
    """Each answer as the same rounded model gives it alone, token by token."""
    plain, answers = family(name)
    decoder = load(plain.directory, torch.float32, max_length=LONGEST, quantization=quantization)
    tiny = TinyModel(decoder, plain.reference, plain.directory)
    engine = make_engine(tiny, **CONDITIONS[condition])
    collector = Collector(engine)
    for i, (prompt, tokens) in enumerate(answers):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=len(tokens)))
        collector.step()
    collector.drain()
    for i, (prompt, tokens) in enumerate(answers):
        sequences, chunk = PagedSequences(decoder), prompt
        for got in collector.tokens[str(i), 0]:
            (logits,) = sequences.step({"a": chunk})
            # Experts of rows beside each other may be summed in another order: a tie may go either way.
            assert logits[-1].max() - logits[-1, got] < 1e-4
            chunk = [got]
        assert len(collector.tokens[str(i), 0]) == len(tokens)
    assert engine.stats.preemptions > 0 and engine.stats.prefix_hits > 0
