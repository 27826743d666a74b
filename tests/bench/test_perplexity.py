"""Perplexity: windows, and equality with transformers through the real engine."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmtool.bench.perplexity import (
    Perplexity,
    PerplexityConfig,
    Text,
    change,
    read_text,
    run,
    tokenized,
    windows,
)
from llmtool.cli.bench_perplexity import _show, arguments, baseline_of, bench_perplexity
from llmtool.cli.output import Output
from llmtool.config import EngineConfig
from llmtool.errors import LLMToolError, UsageError
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.async_engine import AsyncEngine
from tests.runtime.tiny import VOCAB, TinyModel, make_tiny_model
from tests.serve.fake import tiny_tokenizer


def test_every_token_is_scored_once_with_enough_before_it() -> None:
    rng = random.Random(0)
    for _ in range(500):
        n, window, bos = rng.randint(2, 80), rng.randint(2, 20), rng.random() < 0.5
        stride = rng.randint(1, window - 1)
        scored: list[int] = []
        for w in windows(n, window, stride, bos):
            assert 0 <= w.start <= w.scored < w.end <= n and w.end - w.start + bos <= window
            assert w.scored > w.start or bos
            assert w.scored - w.start >= min(w.scored, window - bos - stride)
            scored += range(w.scored, w.end)
        assert scored == list(range(0 if bos else 1, n))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def reference(tiny: TinyModel, text: Text, window: int, stride: int) -> np.ndarray:
    """The same by transformers, one window at a time."""
    rows = []
    for w in windows(len(text.token_ids), window, stride, bool(text.bos)):
        ids = [*text.bos, *text.token_ids[w.start : w.end]]
        logprobs = tiny.logprobs(ids)
        at = range(len(text.bos) + w.scored - w.start, len(ids))
        rows += [-logprobs[i - 1, ids[i]].item() for i in at]
    return np.array(rows)


def engine_config(tiny: TinyModel, **settings: object) -> EngineConfig:
    # Fewer tokens per step than a window has: windows come in chunks.
    own: dict[str, object] = {
        "model": str(tiny.directory),
        "dtype": "float32",
        "num_threads": 1,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,
        "kv_cache_memory_bytes": 2**22,
    }
    return EngineConfig(**(own | settings))  # type: ignore[arg-type]


def test_equal_to_transformers_through_the_engine(tiny: TinyModel) -> None:
    rng = random.Random(1)
    ids = tuple(rng.randrange(2, VOCAB) for _ in range(300))

    async def body() -> None:
        engine = await AsyncEngine.start(engine_config(tiny))
        try:
            for bos, window, stride in (((), 64, 32), ((1,), 100, 7), ((), 159, 158), ((1,), 20, 10)):
                text, seen = Text("made", ids, 1000, bos), list[float]()
                config = PerplexityConfig(window, stride, 0)
                result = await run(engine, text, config, lambda what, part, seen=seen: seen.append(part))
                expected = reference(tiny, text, window, stride)
                np.testing.assert_allclose(result.nlls, expected, atol=1e-4)
                assert abs(result.nll - expected.mean()) < 1e-5
                assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-4)
                assert result.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / 1000, rel=1e-4)
                assert len(result.nlls) == 299 + len(bos) and seen[-1] == 1.0
            with pytest.raises(LLMToolError, match="160 tokens"):
                await run(engine, Text("long", ids, 1000), PerplexityConfig(200))
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(body(), 120))


def test_from_the_command_with_a_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: TinyModel
) -> None:
    (tiny.directory / "tokenizer.json").write_text(tiny_words().backend.to_str())
    file = tmp_path / "text.txt"
    file.write_text("The quick brown föx jumps over the lazy dog. " * 20)
    engine = engine_config(tiny, dtype="bfloat16")
    baseline = baseline_of(engine, ["dtype=float32"])
    out = tmp_path / "out.json"
    bench_perplexity(engine, baseline, PerplexityConfig(50, 25, 150), str(file), Output(True, True), str(out))
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["dtype"] == "bfloat16" and document["baseline"]["dtype"] == "float32"
    assert 2 <= document["baseline"]["weight_bytes"] / document["weight_bytes"] < 32 / 12
    text = tokenized("t", file.read_text(), tiny_words(), 150)
    expected = reference(tiny, text, 50, 25)
    assert document["baseline"]["nll_per_token"] == pytest.approx(expected.mean(), abs=1e-4)
    assert document["tokens"] == 149
    moved = document["change"]
    difference = document["nll_per_token"] - document["baseline"]["nll_per_token"]
    assert moved["same_tokens"] and moved["nll_per_token"] == pytest.approx(difference, abs=1e-9)
    assert 0 < abs(difference) < 0.5
    ratio = document["perplexity"] / document["baseline"]["perplexity"]
    assert moved["perplexity_percent"] == pytest.approx(100 * (ratio - 1), rel=1e-6)
    _show(document, Output())
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "Perplexity changes by" in shown
    with pytest.raises(UsageError, match="--perplexity-window to 159"):
        bench_perplexity(engine, None, PerplexityConfig(160, 25), str(file), Output(True, True), None)


def tiny_words() -> Tokenizer:
    """Bytes, so that all ids are the tiny model's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 20, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the lazy dog jumps"] * 2, trainer)
    return Tokenizer(backend, {}, {})


def test_bytes_are_those_of_the_scored_tokens() -> None:
    tokenizer, text = tiny_tokenizer(), "föx and döts, " * 50
    for limit in (0, 7, 30):
        made = tokenized("t", text, tokenizer, limit)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert list(made.token_ids) == (ids[:limit] if limit else ids)
        wanted = b"".join(map(tokenizer.token_bytes, made.token_ids[1:]))
        assert abs(made.num_bytes - len(wanted)) <= 1  # a token may hold half a character
    with pytest.raises(UsageError, match="nothing to score"):
        tokenized("t", "a", tokenizer, 0)


def test_changes_between_other_tokenizers_go_by_bytes() -> None:
    a = Perplexity(Text("t", (1, 2, 3), 10), np.array([1.0, 2.0]), 1.0)
    b = Perplexity(Text("t", (1, 2, 3, 4), 10), np.array([1.0, 1.0, 0.7]), 1.0)
    assert change(a, b) == {"bits_per_byte_percent": pytest.approx(-10.0), "same_tokens": False}
    c = Perplexity(a.text, np.array([1.5, 1.7]), 1.0)
    moved = change(a, c)
    assert moved["nll_per_token"] == pytest.approx(0.1) and moved["nll_standard_error"] == pytest.approx(0.4)
    assert moved["perplexity_percent"] == pytest.approx(100 * (c.perplexity / a.perplexity - 1))


def test_arguments_and_settings(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x")
    assert arguments([], None) == (None, None)
    assert arguments([str(text)], None) == (None, str(text))
    assert arguments(["m", str(text)], None) == arguments([str(text), "m"], None) == ("m", str(text))
    assert arguments(["m"], "other") == ("m", "other")
    for wrong, path in ((["m", "n"], None), ([str(text)], "other")):
        with pytest.raises(UsageError, match="Unexpected argument"):
            arguments(wrong, path)
    engine = EngineConfig(max_model_len=5)
    assert baseline_of(engine, []) is None
    other = baseline_of(engine, ["max-model-len=none", "block_size=32"])
    assert other is not None and (other.max_model_len, other.block_size) == (None, 32)
    for wrong_setting in ("dtype", "no_such=1", "block_size=x"):
        with pytest.raises(UsageError):
            baseline_of(engine, [wrong_setting])
    assert read_text(None)[0] == "pydoc_data.topics" and len(read_text(None)[1]) > 400_000
    with pytest.raises(UsageError, match="No such file"):
        read_text(str(tmp_path / "none"))
    for bad in ({"perplexity_window": 1}, {"perplexity_stride": 1024}, {"perplexity_tokens": -1}):
        with pytest.raises(UsageError):
            PerplexityConfig(**bad)
