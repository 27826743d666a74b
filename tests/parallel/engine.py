"""Engines over several real processes, in a test: rank 0 is the test's own process."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.memory.tables import PlanPages
from llmtool.core.ports import Drafts, RealClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.core.steplog import StepLogWriter
from llmtool.runtime.parallel.executor import build_parallel
from llmtool.runtime.parts import EngineParts

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "num_threads": 1,
    "kv_cache_memory_bytes": 2**20,
    "distributed_timeout_seconds": 60.0,
}
Answers = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompts, and what is said to each


@contextmanager
def running(directory: Path, tp: int, pp: int, **settings: Any) -> Iterator[EngineParts]:
    config = EngineConfig(
        model=str(directory),
        tokenizer=str(directory),
        **{**SETTINGS, "tensor_parallel_size": tp, "pipeline_parallel_size": pp, **settings},
    )
    parts = build_parallel(config, directory, lambda text, fraction: None)
    try:
        yield parts
    finally:
        assert parts.close is not None
        parts.close()


def engine_of(
    parts: EngineParts,
    log: io.StringIO | None = None,
    drafts: Drafts | None = None,
    num_pages: int | None = None,
    prefix_caching: bool = True,
    **limits: Any,
) -> Engine:
    """An engine over parts that are used again: `num_pages` of them, and limits of its scheduler."""
    config = replace(parts.scheduler, **limits)
    sized = replace(parts, num_pages=num_pages or parts.num_pages, scheduler=config)
    scheduler = Scheduler(config, sized.allocator(prefix_caching), (), drafts)
    writer = None if log is None else StepLogWriter(log, scheduler)
    return Engine(scheduler, parts.executor, RealClock(), writer)


def check(engine: Engine, answers: Answers, seed: int = 1) -> None:
    """All at once; every answer is the one that the whole model gives alone."""
    rng = random.Random(seed)
    said: dict[str, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            assert output.error is None
            said.setdefault(output.request_id, []).extend(output.token_ids)

    for i, (prompt, tokens) in enumerate(answers):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=len(tokens)))
        for _ in range(rng.randint(0, 2)):
            step()
    for _ in range(5000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work
    engine.scheduler.allocator.check()
    for i, (_, tokens) in enumerate(answers):
        assert said[str(i)] == list(tokens), i


def few_pages(parts: EngineParts, answers: Answers, budget: int) -> int:
    """Little more than the longest sequence needs, in steps of `budget` tokens."""
    longest = max(len(prompt) + len(tokens) for prompt, tokens in answers)
    sizes = parts.pages if isinstance(parts.pages, KVCacheGroup) else PlanPages(parts.pages, budget)
    return sizes.pages(longest) * 9 // 8
