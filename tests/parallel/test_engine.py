"""An engine over processes says, greedily, what transformers' generate says, whatever the scheduler does."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llmtool.core.request import SamplingParams
from llmtool.core.speculation.controllers import FixedController
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.steplog import replay
from llmtool.models.loader import load
from tests.models.conftest import build
from tests.parallel.engine import Answers, check, engine_of, few_pages, running
from tests.runtime.test_engine_equality import conversations
from tests.runtime.test_speculation import knowing
from tests.runtime.tiny import MAX_LEN, VOCAB, TinyModel

SIZES = {"vocab_size": VOCAB, "max_position_embeddings": MAX_LEN, "num_hidden_layers": 3}
LONGEST = 64
# (tensor, pipeline, experts on ranks of their own)
SHAPES = {
    "llama tp2": ("llama", 2, 1, False),
    "llama pp2": ("llama", 1, 2, False),
    "llama tp2 pp2": ("llama", 2, 2, False),
    "gemma3 tp2": ("gemma3", 2, 1, False),
    "gemma3 pp2": ("gemma3", 1, 2, False),
    "gemma3 tp2 pp2": ("gemma3", 2, 2, False),
    "mixtral tp2": ("mixtral", 2, 1, False),
    "mixtral pp2": ("mixtral", 1, 2, False),
    "mixtral ep2": ("mixtral", 2, 1, True),
    "mixtral ep2 pp2": ("mixtral", 2, 2, True),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Answers]]:
    """name -> (the directory, [(prompt, transformers' greedy tokens)]); built once."""
    built: dict[str, tuple[Path, Answers]] = {}

    def get(name: str) -> tuple[Path, Answers]:
        if name not in built:
            directory = tmp_path_factory.mktemp(name)
            reference = build(name, **SIZES)
            reference.save_pretrained(directory)
            whole = TinyModel(load(directory, torch.float32, max_length=LONGEST), reference, directory)
            rng = random.Random(len(name))
            answers = [(p, whole.greedy(p, rng.randint(8, 20))) for p in conversations(8, 3)]
            built[name] = directory, answers
        return built[name]

    return get


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_the_single_process_s(
    family: Callable[[str], tuple[Path, Answers]], shape: str, tmp_path: Path
) -> None:
    """One set of processes: batching and prefix hits, preemption, drafts that are often wrong; and the step log
    of the lot decides the same on a virtual clock."""
    name, tp, pp, experts = SHAPES[shape]
    directory, answers = family(name)
    with running(directory, tp, pp, enable_expert_parallel=experts, max_model_len=LONGEST) as parts:
        assert parts.executor.max_in_flight == pp
        engine = engine_of(parts)
        check(engine, answers)
        assert engine.stats.prefix_hits > 0 and engine.stats.preemptions == 0

        log = io.StringIO()
        engine = engine_of(parts, log, num_pages=few_pages(parts, answers, 13), max_num_batched_tokens=13)
        check(engine, answers)
        assert engine.stats.preemptions > 0
        path = tmp_path / "steps.jsonl"
        path.write_text(log.getvalue())
        repeated = replay(path)
        assert repeated.mismatch is None and repeated.steps == engine.stats.steps

        outputs = {(str(i), 0): list(tokens) for i, (_, tokens) in enumerate(answers)}
        proposer = knowing(outputs, [(list(p), SamplingParams()) for p, _ in answers], 0.6, 3)
        engine = engine_of(parts, drafts=Speculator(FixedController(3), proposer))
        check(engine, answers)
        spec = engine.stats.spec
        assert spec is not None and 0 < spec.accepted_tokens < spec.draft_tokens
