"""Encoders through the engine: vectors equal to transformers' whatever shares a step, limits, aborts."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtool.config import EngineConfig
from llmtool.core.pooling import PoolingEngine, PoolingScheduler
from llmtool.core.ports import RealClock
from llmtool.core.request import FinishReason, SamplingParams
from llmtool.errors import ModelError, RequestError, RequestTooLong, UsageError
from llmtool.modelspec import PoolingSpec
from llmtool.runtime.async_engine import RequestStream
from llmtool.runtime.build import build
from llmtool.runtime.fleet import start_engine
from llmtool.runtime.fleet_stream import FleetStream
from llmtool.runtime.parts import PoolingParts
from tests.models.encoders import FAMILIES, classifier
from tests.models.encoders import build as build_reference


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    yield
    torch.set_num_threads(threads)


def sentence_transformer(
    directory: Path, pooling: dict[str, Any], normalize: bool = True, **more: Any
) -> None:
    """The files that sentence-transformers writes beside a model."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "path": "" if i == 0 else f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 60, **more}))


def parts_of(directory: Path, **settings: Any) -> PoolingParts:
    config = EngineConfig(model=str(directory), dtype="float32", num_threads=1, **settings)
    parts = build(config, lambda text, fraction: None)
    assert isinstance(parts, PoolingParts)
    return parts


def random_inputs(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 97) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def vector(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.float32)


def run_all(
    parts: PoolingParts, requests: dict[str, Sequence[Sequence[int]]]
) -> dict[tuple[str, int], np.ndarray]:
    engine = PoolingEngine(PoolingScheduler(parts.scheduler), parts.executor, RealClock())
    for name, inputs in requests.items():
        engine.pool(name, inputs)
    found = {}
    while engine.has_work:
        found |= {(o.request_id, o.index): vector(o.vector) for o in engine.step()}
    return found


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_embeddings_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = build_reference(name)
    reference.save_pretrained(tmp_path)
    sentence_transformer(tmp_path, {"pooling_mode_mean_tokens": True})
    parts = parts_of(tmp_path, max_num_seqs=7, max_num_batched_tokens=150)
    info = parts.info.pooling
    assert info is not None and (info.task, info.size, info.normalized) == ("embed", 48, True)
    requests = {"a": random_inputs(20), "b": random_inputs(1, seed=1), "c": random_inputs(9, seed=2)}
    found = run_all(parts, requests)
    for request, inputs in requests.items():
        for i, ids in enumerate(inputs):
            with torch.inference_mode():
                row = reference(torch.tensor([ids])).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(found[request, i], (row / row.norm()).numpy(), atol=1e-5)


def test_the_second_text_of_a_pair_where_there_is_one_type(tmp_path: Path) -> None:
    """A tokenizer may mark it where the model has a single row, as RoBERTa has: that row is then of both texts."""
    reference = build_reference("roberta", "AutoModelForSequenceClassification", id2label={0: "score"})
    reference.save_pretrained(tmp_path)
    parts = parts_of(tmp_path)
    engine = PoolingEngine(PoolingScheduler(parts.scheduler), parts.executor, RealClock())
    inputs = random_inputs(3, longest=20)
    engine.pool("a", inputs, segments=[len(ids) // 2 for ids in inputs])
    for output in engine.step():
        assert output.error is None
        with torch.inference_mode():
            logits = reference(torch.tensor([inputs[output.index]])).logits[0]
        np.testing.assert_allclose(vector(output.vector), logits.sigmoid().numpy(), atol=1e-5)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_probabilities_equal_transformers(problem: str, tmp_path: Path) -> None:
    reference = classifier("bert", problem_type=problem)
    reference.save_pretrained(tmp_path)
    parts = parts_of(tmp_path)
    assert parts.info.pooling is not None and parts.info.pooling.labels == ("no", "maybe", "yes")
    inputs = random_inputs(12)
    found = run_all(parts, {"a": inputs})
    for i, ids in enumerate(inputs):
        with torch.inference_mode():
            logits = reference(torch.tensor([ids])).logits[0]
        expected = logits.sigmoid() if problem.startswith("multi") else logits.softmax(-1)
        np.testing.assert_allclose(found["a", i], expected.numpy(), atol=1e-5)


def test_pooling_is_read_as_sentence_transformers_writes_it(tmp_path: Path) -> None:
    modes = {
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": True,
        "pooling_mode_lasttoken": False,
    }
    sentence_transformer(tmp_path, modes, normalize=False, do_lower_case=True)
    prompts = {"default_prompt_name": "query", "prompts": {"query": "query: "}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert PoolingSpec.from_dir(tmp_path) == PoolingSpec(("cls", "mean"), False, 60, "query: ", True)
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert PoolingSpec.from_dir(tmp_path).modes == ("last",)
    config.write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(ModelError, match="weightedmean"):
        PoolingSpec.from_dir(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="Dense"):
        PoolingSpec.from_dir(tmp_path)
    assert PoolingSpec.from_dir(tmp_path / "1_Pooling") == PoolingSpec()  # no modules: the mean


def test_limits_of_settings(tmp_path: Path) -> None:
    build_reference("roberta").save_pretrained(tmp_path)
    sentence_transformer(tmp_path, {"pooling_mode_cls_token": True})
    assert parts_of(tmp_path).scheduler.max_model_len == 60
    assert parts_of(tmp_path, max_model_len=198).scheduler.max_model_len == 198  # 200 rows, 2 of them unused
    with pytest.raises(UsageError, match="made for 198 tokens"):
        parts_of(tmp_path, max_model_len=199)
    with pytest.raises(UsageError, match="whole sequence of 198 tokens"):
        parts_of(tmp_path, max_model_len=198, max_num_batched_tokens=100)


@pytest.mark.parametrize(
    ("setting", "value", "flag"),
    [
        ("step_log", "steps.jsonl", "--step-log"),
        ("quantization", "int8", "--quantization"),
        ("kv_cache_dtype", "fp8", "--kv-cache-dtype"),
        ("block_size", 32, "--block-size"),
        ("kv_cache_memory_bytes", 2**30, "--kv-cache-memory"),
        ("gpu_memory_utilization", 0.5, "--gpu-memory-utilization"),
        ("swap_space_bytes", 2**30, "--swap-space"),
        ("preemption", "swap", "--preemption"),
    ],
)
def test_settings_that_an_encoder_would_ignore_are_refused(
    setting: str, value: object, flag: str, tmp_path: Path
) -> None:
    build_reference("bert").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=setting) as error:
        parts_of(tmp_path, **{setting: value})
    assert error.value.remedy == f"Leave out {flag}."


def test_a_sequence_that_fails_ends_alone(tmp_path: Path) -> None:
    reference = build_reference("bert")
    with torch.no_grad():
        reference.embeddings.word_embeddings.weight[50] = float("nan")
    reference.save_pretrained(tmp_path)
    parts = parts_of(tmp_path)
    engine = PoolingEngine(PoolingScheduler(parts.scheduler), parts.executor, RealClock())
    engine.pool("a", [[5, 6], [7, 97, 8], [5, 50, 6, 7], [-1]])
    outputs = {o.index: o for o in engine.step()}
    assert outputs[0].finish_reason is FinishReason.STOP and np.isfinite(vector(outputs[0].vector)).all()
    assert "Token id 97 is not in the model's vocabulary of 97" in (outputs[1].error or "")
    assert "not numbers" in (outputs[2].error or "")
    assert "Token id -1" in (outputs[3].error or "")


async def collect(stream: RequestStream | FleetStream) -> dict[int, np.ndarray]:
    return {output.index: vector(output.vector) async for output in stream}


@pytest.mark.parametrize("replicas", [1, 2])
def test_through_the_engine_process(replicas: int, tmp_path: Path) -> None:
    reference = build_reference("bert")
    reference.save_pretrained(tmp_path)

    async def body() -> None:
        config = EngineConfig(
            model=str(tmp_path), dtype="float32", num_threads=1, max_num_seqs=4, max_num_batched_tokens=200,
            data_parallel_size=replicas,
        )  # fmt: skip
        engine = await start_engine(config)
        try:
            steps: list[int] = []
            engine.on_step = steps.append
            requests = {f"r{i}": random_inputs(1 + i % 5, seed=i) for i in range(12)}
            streams = await asyncio.gather(*(engine.pool(name, inputs) for name, inputs in requests.items()))
            found = await asyncio.gather(*map(collect, streams))
            assert sum(steps) == sum(len(ids) for inputs in requests.values() for ids in inputs)
            for inputs, vectors in zip(requests.values(), found, strict=True):
                assert sorted(vectors) == list(range(len(inputs)))
                for i, ids in enumerate(inputs):
                    with torch.inference_mode():
                        row = reference(torch.tensor([ids])).last_hidden_state[0].mean(0)
                    np.testing.assert_allclose(vectors[i], row.numpy(), atol=1e-4)
            with pytest.raises(RequestTooLong, match="201 tokens, but this model takes 200"):
                await engine.pool("long", [[5] * 201])
            with pytest.raises(RequestError, match="token id 97"):
                await engine.pool("wrong", [[5], [97]])
            with pytest.raises(RequestError, match="generates nothing"):
                await engine.add("text", [5], SamplingParams())
            gone = await engine.pool("gone", random_inputs(200, longest=180))
            gone.abort()
            reasons = [output.finish_reason async for output in gone]
            assert len(reasons) == 200 and FinishReason.ABORT in reasons
            assert await engine.drain(10.0)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(body(), 120))
