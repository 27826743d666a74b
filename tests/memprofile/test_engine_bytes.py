"""The bytes that memprofile computes are those that the engine allocates, to the byte, on a CPU.

Models are the tiny ones of the decoder's tests, saved by transformers; memprofile reads their config.json alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtool.config import EngineConfig
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.stats import memory_view
from llmtool.memprofile.demand import demand
from llmtool.memprofile.setting import Setting
from llmtool.modelspec.catalogue import read_config
from llmtool.runtime.executor import build_engine
from llmtool.sim.ir import read_ir
from llmtool.sim.memory import stage_weights
from tests.models.conftest import FAMILIES, build
from tests.runtime.test_structured import TOKENIZER

SIZES = {"vocab_size": 300, "hidden_size": 48}
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


@pytest.mark.parametrize("name", [n for n in NAMES if n in FAMILIES])
def test_kv_bytes_equal_the_engine_s(name: str, tmp_path: Path) -> None:
    model = build(name, **SIZES)
    model.save_pretrained(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", device="cpu", num_threads=1, max_num_seqs=4, block_size=8,
        max_model_len=128, kv_cache_memory_bytes=1 << 20,
    )  # fmt: skip
    parts = build_engine(config, lambda what, fraction: None)
    ir = read_ir(read_config(str(tmp_path)), name)
    s = Setting(ir, 1 << 30, kv_dtype="fp32", max_len=128, page=8, max_seqs=4)
    profiled = demand("paged", s, 1 << 20, 64)
    # The arena, what a page holds, and what each length takes of it.
    assert profiled.arena == parts.info.kv_bytes == parts.executor.store.arena.numel()  # type: ignore[attr-defined]
    assert profiled.plan is not None and profiled.plan.groups[0].page_bytes == parts.group.page_bytes
    assert sum(g.bytes_per_token for g in profiled.plan.groups) == parts.group.bytes_per_token
    allocator = UniformAllocator(parts.group, parts.num_pages)
    for i, length in enumerate((1, 8, 9, 127)):
        before = memory_view(allocator).parts["free"]
        allocator.begin(f"r{i}", [i] * length, length)
        assert before - memory_view(allocator).parts["free"] == profiled.table[0, length]
    # All weights are there in float32: memprofile counts the same numbers in 16 bits.
    assert round(stage_weights(ir, s.plan, 0, ir.num_layers, "bf16")) * 2 == parts.info.num_parameters * 4
