from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import RealClock
from llmtool.core.request import Grammar, SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.errors import InfeasibleError
from llmtool.runtime.executor import build_engine
from llmtool.runtime.parts import EngineParts
from tests.runtime.test_structured import TOKENIZER
from tests.runtime.tiny import EOS, MAX_LEN, VOCAB, TinyModel


@pytest.fixture(scope="module")
def directory(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny.directory, target)
    TOKENIZER.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return target


def build(directory: Path, **settings: Any) -> tuple[EngineParts, list[tuple[str, float]]]:
    seen: list[tuple[str, float]] = []
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 4,
        "num_threads": 1,
        "block_size": 8,
    }
    config = EngineConfig(model=str(directory), **(defaults | settings))
    return build_engine(config, lambda what, fraction: seen.append((what, fraction))), seen


def engine_of(parts: EngineParts) -> Engine:
    allocator = UniformAllocator(parts.group, parts.num_pages, parts.host_pages)
    return Engine(
        Scheduler(parts.scheduler, allocator, parts.info.eos_token_ids), parts.executor, RealClock()
    )


def answer(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    engine.add("x", prompt, params, seed=1)
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens.extend(output.token_ids)
    return tokens


def test_an_engine_from_settings_serves(tiny: TinyModel, directory: Path) -> None:
    parts, seen = build(directory, swap_space_bytes=2**20)
    engine = engine_of(parts)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert answer(engine, [5, 6, 7], params) == tiny.greedy([5, 6, 7], 20)
    grammar = SamplingParams(max_tokens=100, grammar=Grammar("choice", '["left", "right"]'))
    text = TOKENIZER.decode(answer(engine, [5, 6, 7], grammar))
    assert text in ("left", "right")
    info = parts.info
    assert (info.vocab_size, info.eos_token_ids, info.max_model_len) == (VOCAB, (EOS,), MAX_LEN)
    assert info.num_pages == parts.num_pages == 4 * MAX_LEN // 8
    assert info.page_bytes == parts.group.page_bytes
    assert info.host_pages == parts.host_pages == 2**20 // info.page_bytes
    assert info.kv_bytes == parts.executor.store.nbytes  # type: ignore[attr-defined]
    assert 4 <= info.weight_bytes / info.num_parameters < 1.1 * 4
    assert info.num_parameters == sum(p.numel() for p in tiny.reference.parameters())
    assert (info.dtype, info.device, info.num_threads) == ("float32", "cpu", 1)
    assert info.tokenizer_dir == str(directory)
    assert parts.scheduler.max_model_len == MAX_LEN
    fractions = [fraction for what, fraction in seen if what == "Loading weights"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert seen[-1][0] == "Warming up"


def test_random_weights_need_no_weights(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(directory / name, tmp_path)
    one, two = (build(tmp_path, load_format="dummy", seed=3)[0] for _ in range(2))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert answer(engine_of(one), [5, 6], params) == answer(engine_of(two), [5, 6], params)


def test_the_end_token_may_be_known_to_the_tokenizer_only(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "silent"
    shutil.copytree(directory, target)
    (target / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((target / "config.json").read_text())
    config["eos_token_id"] = None
    (target / "config.json").write_text(json.dumps(config))
    assert build(target)[0].info.eos_token_ids == (EOS,)


def test_a_tokenizer_from_elsewhere(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "tokenizer.json", tmp_path)
    assert build(directory, tokenizer=str(tmp_path))[0].info.tokenizer_dir == str(tmp_path)


def test_the_context_follows_the_memory(directory: Path) -> None:
    page_bytes = build(directory)[0].info.page_bytes
    parts, _ = build(directory, kv_cache_memory_bytes=10 * page_bytes)
    assert parts.info.max_model_len == parts.scheduler.max_model_len == 80
    with pytest.raises(InfeasibleError):
        build(directory, kv_cache_memory_bytes=10 * page_bytes, max_model_len=81)


def test_bf16_runs(directory: Path) -> None:
    parts, _ = build(directory, dtype="bfloat16")
    assert 2 <= parts.info.weight_bytes / parts.info.num_parameters < 1.1 * 2  # panels are padded
    params = SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True, logprobs=3)
    assert len(answer(engine_of(parts), [5, 6, 7], params)) == 12
