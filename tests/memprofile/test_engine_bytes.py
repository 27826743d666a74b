"""The bytes that memprofile computes are those that the engine allocates, to the byte, on a CPU.

Models are the tiny ones of the decoder's and the hybrids' tests, saved by transformers; memprofile reads their
config.json alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from llmtool.config import EngineConfig
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.stats import memory_view
from llmtool.memprofile.demand import PLANS, demand
from llmtool.memprofile.setting import Setting
from llmtool.modelspec.catalogue import read_config
from llmtool.runtime.executor import build_engine
from llmtool.runtime.parts import EngineParts
from llmtool.sim.ir import read_ir
from llmtool.sim.memory import stage_weights
from tests.models.conftest import FAMILIES, build
from tests.runtime import test_hybrids
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
HYBRIDS = ("lfm2", "lfm2-biased", "falcon-h1", "falcon-h1-norm")
ARENA = 1 << 20


def made(name: str, where: Path, plan: str) -> tuple[EngineParts, Setting]:
    if name in FAMILIES:
        model = build(name, vocab_size=300)
    else:
        kind, settings = test_hybrids.MODELS[name]
        config = getattr(transformers, kind)(**{**test_hybrids.SIZES, **settings})
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(where)
    TOKENIZER.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "max_num_seqs": 4}
    limits: dict[str, Any] = {"block_size": 8, "max_model_len": 128, "kv_cache_memory_bytes": ARENA}
    parts = build_engine(
        EngineConfig(model=str(where), kv_page_plan=plan, **settings, **limits), lambda what, fraction: None
    )
    ir = read_ir(read_config(str(where)), name)
    return parts, Setting(ir, 1 << 30, kv_dtype="fp32", max_len=128, page=8, max_seqs=4)


@pytest.mark.parametrize("plan", ["near", "lcm", "uniform"])
@pytest.mark.parametrize("name", [*NAMES, *HYBRIDS])
def test_kv_bytes_equal_the_engine_s(name: str, plan: str, tmp_path: Path) -> None:
    if plan == "uniform" and name in HYBRIDS:
        pytest.skip("the engine has no uniform pages for states")
    parts, s = made(name, tmp_path, plan)
    profiled = demand(
        next(k for k, v in PLANS.items() if v == (plan if isinstance(parts.pages, PagePlan) else "uniform")),
        s, ARENA, 64,
    )  # fmt: skip
    assert profiled.arena == parts.info.kv_bytes == parts.executor.store.arena.numel()  # type: ignore[attr-defined]
    assert profiled.plan is not None
    groups = parts.pages.groups if isinstance(parts.pages, PagePlan) else (parts.pages,)
    ours = {
        g.name: (len(g.layers), g.page_bytes, g.payload_bytes, g.tokens_per_page)
        for g in profiled.plan.groups
    }
    assert ours == {g.name: (len(g.layers), g.page_bytes, g.payload_bytes, g.tokens_per_page) for g in groups}
    allocator = parts.allocator(prefix_caching=False)
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
    parts, s = made(name, tmp_path, "near")
    assert round(stage_weights(s.ir, s.plan, 0, s.ir.num_layers, "bf16")) * 2 == parts.info.num_parameters * 4
