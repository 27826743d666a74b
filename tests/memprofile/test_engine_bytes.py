"""The bytes that memprofile computes are those that the engine allocates, to the byte, on a CPU.

Models are the tiny ones of the decoder's tests, saved by transformers; memprofile reads their config.json alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtool.config import EngineConfig
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.stats import memory_view
from llmtool.memprofile.demand import PLANS, demand
from llmtool.memprofile.setting import Setting
from llmtool.modelspec.catalogue import read_config
from llmtool.runtime.executor import build_engine
from llmtool.runtime.parts import EngineParts
from llmtool.sim.ir import read_ir
from llmtool.sim.memory import stage_weights
from tests.models.conftest import build
from tests.runtime.test_structured import TOKENIZER

NAMES = (
    "llama",
    "mistral-window",
    "ministral",
    "gemma2",
    "gemma3",
    "qwen3-moe",
    "gpt-oss",
    "deepseek-v3",
    "olmo2",
)
# One page for all layers, or, where the engine has a choice, plans for layers that cache different things too.
PAGES = ("uniform", "near", "lcm") if hasattr(EngineConfig, "kv_page_plan") else ("uniform",)
ARENA = 1 << 20


def made(name: str, where: Path, plan: str) -> tuple[EngineParts, Setting]:
    build(name, vocab_size=300).save_pretrained(where)
    TOKENIZER.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "max_num_seqs": 4}
    limits: dict[str, Any] = {"block_size": 8, "max_model_len": 128, "kv_cache_memory_bytes": ARENA}
    if len(PAGES) > 1:
        limits["kv_page_plan"] = plan
    parts = build_engine(EngineConfig(model=str(where), **settings, **limits), lambda what, fraction: None)
    ir = read_ir(read_config(str(where)), name)
    return parts, Setting(ir, 1 << 30, kv_dtype="fp32", max_len=128, page=8, max_seqs=4)


def pages_of(parts: EngineParts) -> tuple[Any, Any]:
    """The engine's pages and an allocator over them, without a prefix cache."""
    if len(PAGES) > 1:
        return parts.pages, parts.allocator(prefix_caching=False)  # type: ignore[attr-defined]
    return parts.group, UniformAllocator(parts.group, parts.num_pages, prefix_caching=False)


@pytest.mark.parametrize("plan", PAGES)
@pytest.mark.parametrize("name", NAMES)
def test_kv_bytes_equal_the_engine_s(name: str, plan: str, tmp_path: Path) -> None:
    parts, s = made(name, tmp_path, plan)
    pages, allocator = pages_of(parts)
    mode = plan if isinstance(pages, PagePlan) else "uniform"
    profiled = demand(next(k for k, v in PLANS.items() if v == mode), s, ARENA, 64)
    assert profiled.arena == parts.info.kv_bytes == parts.executor.store.arena.numel()  # type: ignore[attr-defined]
    assert profiled.plan is not None
    groups = pages.groups if isinstance(pages, PagePlan) else (pages,)
    ours = {
        g.name: (len(g.layers), g.page_bytes, g.payload_bytes, g.tokens_per_page)
        for g in profiled.plan.groups
    }
    assert ours == {g.name: (len(g.layers), g.page_bytes, g.payload_bytes, g.tokens_per_page) for g in groups}
    before = memory_view(allocator)
    assert before.arena == before.parts["free"] == profiled.arena
    for i, length in enumerate((1, 7, 8, 61)):
        free, tokens = owned(allocator), [i] * length
        allocator.begin(f"r{i}", tokens, length)
        allocator.advance(f"r{i}", length)
        allocator.extend(f"r{i}", length + 1)  # decoding: what has left the windows goes
        assert owned(allocator) - free == profiled.table[0, length + 1], length


def owned(allocator: Any) -> int:
    """Bytes that are some sequence's: pages, or whole large pages."""
    if hasattr(allocator, "arena"):
        return allocator.arena.num_large * allocator.arena.large_page - allocator.arena.ledger()["free"]
    view = memory_view(allocator)
    return view.arena - view.parts["free"]


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_the_engine_s(name: str, tmp_path: Path) -> None:
    """In float32 there, in 16 bits here."""
    parts, s = made(name, tmp_path, "uniform")
    assert round(stage_weights(s.ir, s.plan, 0, s.ir.num_layers, "bf16")) * 2 == parts.info.num_parameters * 4
