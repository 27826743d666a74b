"""Data parallelism with real models: every answer is that of one engine in one process, whatever becomes of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.ports import RealClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.core.stats import EngineStats
from llmtool.runtime.build import build
from llmtool.runtime.fleet import Fleet
from llmtool.runtime.parts import EngineParts
from tests.models.conftest import build as build_reference
from tests.runtime.test_async_engine import run
from tests.runtime.test_engine_equality import conversations
from tests.runtime.test_fleet import ask_greedily, until
from tests.runtime.test_hybrids import make as make_hybrid

MODELS = ["llama", "gemma3", "mixtral"]
HYBRIDS = ["lfm2", "falcon-h1"]
SIZES = {"vocab_size": 300, "max_position_embeddings": 160, "num_hidden_layers": 2}
GROWING = ("llama", "mixtral")  # their memory fills at any pace of the machine; windows and states give back


def config_of(directory: Path, **settings: object) -> EngineConfig:
    """Little memory, so that sequences are preempted; speculation; steps of few tokens."""
    return EngineConfig(
        model=str(directory),
        dtype="float32",
        device="cpu",
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=13,
        max_model_len=140,
        num_threads=1,
        spec="3",
        **settings,  # type: ignore[arg-type]
    )


def make_model(name: str, directory: Path) -> Path:
    model = make_hybrid(name) if name in HYBRIDS else build_reference(name, **SIZES)
    model.save_pretrained(directory)
    return directory


def questions() -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate): beginnings are shared, and texts repeat, for drafts to come from."""
    prompts = conversations(18, 5)
    return [([*prompt, *prompt[-6:], *prompt[-6:]][:60], 50 + i % 20) for i, prompt in enumerate(prompts)]


def alone(config: EngineConfig) -> list[list[int]]:
    """The answers of one engine without anything around it."""
    parts = build(replace(config, spec="off", data_parallel_size=1), lambda text, fraction: None)
    assert isinstance(parts, EngineParts)
    engine = Engine(Scheduler(parts.scheduler, parts.allocator()), parts.executor, RealClock())
    answers: list[list[int]] = [[] for _ in questions()]
    for i, (prompt, count) in enumerate(questions()):
        engine.add(str(i), prompt, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            answers[int(output.request_id)] += output.token_ids
    return answers


def tight(config: EngineConfig) -> EngineConfig:
    """With memory for little more than one of the four sequences that may run."""
    parts = build(config, lambda text, fraction: None)
    assert isinstance(parts, EngineParts)
    pages = parts.allocator().pages_for(140) * 5 // 4
    return replace(config, kv_cache_memory_bytes=pages * parts.info.page_bytes)


async def check_answers(fleet: Fleet, want: list[list[int]]) -> None:
    """All at once, and once more: then prefixes are cached, and drafts come from what was said."""
    for turn in range(2):
        asked = [ask_greedily(fleet, f"{turn}-{i}", *question) for i, question in enumerate(questions())]
        assert await asyncio.gather(*asked) == want
    made = 2 * sum(map(len, want))
    await until(lambda: fleet.stats.generation_tokens == made and fleet.stats.num_running == 0)


def check_conditions(stats: EngineStats) -> None:
    """All of what could have gone wrong has happened."""
    assert stats.preemptions > 0 and stats.prefix_hits > 0
    assert stats.spec is not None and stats.spec.accepted_tokens > 0


@pytest.mark.parametrize("name", MODELS)
def test_two_replicas_say_what_one_engine_says(name: str, tmp_path: Path) -> None:
    directory = make_model(name, tmp_path / "model")
    config = tight(config_of(directory))
    want = alone(config)

    async def body() -> None:
        fleet = await Fleet.start(replace(config, data_parallel_size=2))
        try:
            await check_answers(fleet, want)
            if name in GROWING:
                check_conditions(fleet.stats)
            assert all(r.stats.generation_tokens > 50 for r in fleet.fleet.replicas)
        finally:
            await fleet.close()

    run(body, 150)


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS])
def test_prefill_and_decode_engines_say_what_one_engine_says(name: str, tmp_path: Path) -> None:
    """Pages of full attention, of windows, and of states move."""
    directory = make_model(name, tmp_path / "model")
    config = tight(config_of(directory))
    want = alone(config)

    async def body() -> None:
        fleet = await Fleet.start(replace(config, disaggregate="1:1"))
        try:
            await check_answers(fleet, want)
            prefill, decode = (r.stats for r in fleet.fleet.replicas)
            if name in GROWING:
                assert prefill.prefix_hits > 0 and decode.preemptions > 0
            assert prefill.generation_tokens == 2 * len(want)
            assert decode.generation_tokens == 2 * (sum(map(len, want)) - len(want))
            moved = fleet.fleet.transfers
            assert moved is not None and (moved.done, moved.failed) == (2 * len(want), 0)
            if name in MODELS:  # a state cannot be taken back: no drafts
                assert decode.spec is not None and decode.spec.accepted_tokens > 0
        finally:
            await fleet.close()

    run(body, 150)
