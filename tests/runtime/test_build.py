from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.ports import RealClock
from llmtool.core.request import Grammar, SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.errors import InfeasibleError, ModelError, UsageError
from llmtool.models import loader
from llmtool.runtime import executor
from llmtool.runtime.device import KV_DTYPES
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
    allocator = parts.allocator()
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
    assert info.page_bytes == parts.pages.page_bytes
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
    # Between 12 bits a value, where bfloat16 is compact, and 16, in panels that are padded.
    assert 1.5 <= parts.info.weight_bytes / parts.info.num_parameters < 1.1 * 2
    params = SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True, logprobs=3)
    assert len(answer(engine_of(parts), [5, 6, 7], params)) == 12


def test_a_cpu_refuses_keys_and_values_in_eight_bits(directory: Path) -> None:
    with pytest.raises(UsageError, match="kv_cache_dtype is fp8"):
        build(directory, kv_cache_dtype="fp8")


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_an_engine_serves_from_keys_and_values_in_eight_bits(
    tiny: TinyModel, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On torch, as if this device had them: chunks, pages that are shared and pages that were swapped."""
    monkeypatch.setattr(executor, "pick_kv_dtype", lambda chosen, _: KV_DTYPES.get(chosen))
    monkeypatch.setattr(loader, "kernels", lambda: None)
    settings: dict[str, Any] = {"kv_cache_dtype": name, "max_num_batched_tokens": 8}
    parts, _ = build(directory, **settings)
    assert parts.info.kv_cache_dtype == str(KV_DTYPES[name]).removeprefix("torch.")
    assert 4 * parts.pages.bytes_per_token == tiny.group(8).bytes_per_token
    engine = engine_of(parts)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompt = list(range(5, 25))
    tokens = answer(engine, prompt, params)
    assert answer(engine, prompt, params) == tokens  # the second time from cached pages
    logprobs = tiny.logprobs([*prompt, *tokens])[len(prompt) - 1 : -1]
    # Eight bits may prefer another of two tokens that are nearly as likely; never one that is not.
    behind = logprobs.max(-1).values - logprobs[range(len(tokens)), tokens]
    assert behind.max() < (1.0 if name == "fp8" else 2.0), behind
    assert behind.median() == 0
    assert engine.stats.prefix_hits > 0
    # With room for two of four: what was swapped comes back as it was.
    room = {"kv_cache_memory_bytes": 10 * parts.pages.page_bytes, "swap_space_bytes": 2**20}
    tight = engine_of(build(directory, **settings, **room, max_model_len=48, preemption="swap")[0])
    prompts = [prompt, *([p] * 20 for p in (7, 9, 11))]
    alone = [answer(engine, p, params) for p in prompts]
    for i, p in enumerate(prompts):
        tight.add(str(i), p, params, seed=1)
    together: dict[str, list[int]] = {}
    while tight.has_work:
        for output in tight.step():
            assert output.error is None
            together.setdefault(output.request_id, []).extend(output.token_ids)
    assert [together[str(i)] for i in range(4)] == alone
    assert tight.stats.swapped_pages > 0


def test_scales_of_a_checkpoint_are_used(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "pick_kv_dtype", lambda chosen, _: KV_DTYPES.get(chosen))
    monkeypatch.setattr(loader, "kernels", lambda: None)
    target = Path(shutil.copytree(directory, tmp_path / "scaled"))

    def build_with(scales: dict[str, torch.Tensor]) -> EngineParts:
        tensors = load_file(directory / "model.safetensors")
        named = {f"model.layers.{name}": tensor for name, tensor in scales.items()}
        save_file(tensors | named, target / "model.safetensors", metadata={"format": "pt"})
        return build(target, kv_cache_dtype="fp8")[0]

    parts = build_with(
        {
            "0.self_attn.k_proj.k_scale": torch.tensor(0.5),
            "0.self_attn.v_proj.v_scale": torch.tensor([0.25]),
            "1.self_attn.k_scale": torch.tensor([[[0.125]], [[2.0]]]),
        }
    )
    layouts = parts.executor.store.layouts()  # type: ignore[attr-defined]
    assert [(layouts[i].k_scale, layouts[i].v_scale) for i in (0, 1)] == [(0.5, 0.25), (2.0, 1.0)]
    both = build_with({"1.self_attn.kv_scale": torch.tensor(0.75)}).executor.store.layouts()  # type: ignore[attr-defined]
    assert (both[1].k_scale, both[1].v_scale, both[0].k_scale) == (0.75, 0.75, 1.0)
    with pytest.raises(ModelError, match="layer 1's values is 0"):
        build_with({"1.self_attn.v_scale": torch.tensor(0.0)})
    assert build(target)[0].info.kv_cache_dtype == "float32"  # where they are not needed they hurt nobody
