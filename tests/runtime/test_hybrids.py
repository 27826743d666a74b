"""Models whose layers keep a state, instead of attention or beside it, in the whole engine against transformers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtool.core.engine import Engine
from llmtool.core.memory.tables import PlanPages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.core.ports import RealClock
from llmtool.core.request import BeamParams, SamplingParams
from llmtool.core.steplog import StepLogWriter, replay
from llmtool.models.loader import load
from llmtool.modelspec import ModelSpec
from tests.runtime.test_engine_equality import Collector, conversations, make_engine
from tests.runtime.test_families import check
from tests.runtime.tiny import MAX_LEN, VOCAB, TinyModel

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_LEN,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
MAMBA = {
    "num_hidden_layers": 2,
    "mamba_d_ssm": 48,
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
MULTIPLIERS = {
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 0.7,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "key_multiplier": 0.6,
    "mlp_multipliers": [0.9, 1.2],
    "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.9,
    "ssm_multipliers": [0.7, 1.1, 0.9, 1.2, 0.8],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"num_hidden_layers": 3, "full_attn_idxs": [1], "block_multiple_of": 8}),
    "lfm2-biased": (
        "Lfm2Config",
        {"num_hidden_layers": 3, "full_attn_idxs": [2], "conv_bias": True, "conv_L_cache": 4},
    ),
    "falcon-h1": ("FalconH1Config", {**MAMBA, **MULTIPLIERS}),
    "falcon-h1-norm": ("FalconH1Config", {**MAMBA, "mamba_rms_norm": True, "mamba_proj_bias": True}),
    "falcon-h1-norm-after": (
        "FalconH1Config",
        {**MAMBA, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "projectors_bias": False},
    ),
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "plenty": {"budget": 16, "num_pages": 400},
    "no prefix cache": {"budget": 16, "num_pages": 400, "prefix_caching": False},
    "chunks and recomputation": {"budget": 13},
    "swapping": {"host_pages": 400, "budget": 13, "preemption": "swap"},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name: str) -> Any:
    """transformers' model with random weights."""
    config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**copy.deepcopy({**SIZES, **settings}))
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    built: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in built:
            model = make(name)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            built[name] = TinyModel(load(directory, torch.float32), model, directory)
        return built[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(hybrid: Callable[[str], TinyModel], name: str) -> None:
    """Through chunks of all sizes, and checkpoints inside them."""
    tiny = hybrid(name)
    pages = tiny.plan(4)
    engine = make_engine(tiny, plan="near", num_pages=400, budget=11)
    (prompt,) = [random.Random(3).choices(range(2, VOCAB - 1), k=90)]
    engine.add("x", prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    got = [p.logprob for p in outputs[0].prompt_logprobs[1:] if p]
    reference = tiny.logprobs(prompt)
    assert got == pytest.approx([reference[j, t].item() for j, t in enumerate(prompt[1:])], abs=1e-4)
    assert pages is not None and any(pool.type.is_state for pool in pages.pools)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_greedy_equals_generate(hybrid: Callable[[str], TinyModel], name: str, condition: str) -> None:
    tiny = hybrid(name)
    rng = random.Random(len(name))
    answers = [(prompt, tiny.greedy(prompt, rng.randint(20, 40))) for prompt in conversations(10, 3)]
    longest = max(len(prompt) + len(tokens) for prompt, tokens in answers)
    pages = tiny.plan(4)
    assert pages is not None
    room = {"num_pages": PlanPages(pages, 13).pages(longest) * 5 // 4}
    engine = make_engine(tiny, plan="near", **room | CONDITIONS[condition])
    assert isinstance(engine.scheduler.allocator, TwoLevelAllocator)
    check(engine, answers)
    if condition == "plenty":
        again = make_engine(tiny, plan="near", **CONDITIONS[condition])
        for prompt, tokens in answers[:4]:  # the second time, a state at the prompt's end is there
            for _ in range(2):
                collector = Collector(again)
                again.add("x", prompt, SamplingParams(temperature=0, max_tokens=len(tokens)))
                collector.drain()
                assert collector.tokens["x", 0] == tokens
        assert again.stats.prefix_hits > 0
    stats = engine.stats
    if condition in ("chunks and recomputation", "swapping"):
        assert stats.preemptions > 0
        assert (stats.swapped_pages > 0) == (condition == "swapping")


@pytest.mark.parametrize("name", ["lfm2", "falcon-h1"])
def test_beams_fork_states(hybrid: Callable[[str], TinyModel], name: str, tmp_path: Path) -> None:
    """A beam's state is copied before two write it; and the run replays bit for bit."""
    tiny = hybrid(name)
    path = tmp_path / "run.steplog.jsonl"
    engine = make_engine(tiny, plan="near", num_pages=400)
    with path.open("w") as file:
        engine = Engine(engine.scheduler, engine.executor, RealClock(), StepLogWriter(file, engine.scheduler))
        collector = Collector(engine)
        prompts = conversations(3, 21)
        params = SamplingParams(temperature=0, n=2, max_tokens=10, beam=BeamParams(3))
        for i, prompt in enumerate(prompts):
            engine.add(str(i), prompt, params)
            collector.step()
        collector.drain()
    for i, prompt in enumerate(prompts):
        theirs = tiny.generate(
            prompt, max_new_tokens=10, num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=None
        )
        for index in range(2):
            assert collector.tokens[str(i), index] == theirs[index]
    assert engine.stats.copied_pages > 0
    assert replay(path).mismatch is None


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_weights(hybrid: Callable[[str], TinyModel], name: str) -> None:
    tiny = hybrid(name)
    spec = ModelSpec.from_dir(tiny.directory)
    assert spec.num_parameters == tiny.reference.num_parameters()
    for layer, cache in zip(spec.layers, spec.layer_cache_specs(4), strict=False):
        if layer.mixer is not None and not spec.attention_of(layer).num_heads:
            assert cache.state_bytes == layer.mixer.state_bytes(4)
