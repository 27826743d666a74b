"""GGUF conversion: tiny models written as llama.cpp's converter writes them, and the embedded SmolLM2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from llmtool.errors import ModelError
from llmtool.models import gguf as converter
from llmtool.models.gguf_families import family_of
from llmtool.models.gguf_file import GGUFFile
from llmtool.models.loader import load
from llmtool.models.resolve import resolve
from llmtool.models.tokenizer import Tokenizer
from llmtool.modelspec import ModelSpec
from tests.models.conftest import build
from tests.models.gguf_writer import TOKENS, Quantise, write
from tests.models.paged import PagedSequences

Tiny = Callable[[str], tuple[transformers.PreTrainedModel, Path]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "cache"))


# Family, llama.cpp's name, what of the configuration a GGUF file has no place for, keys of newer files.
CONVERTED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("llama", "llama", {}, {}),
    ("smollm", "llama", {}, {}),
    ("llama-biased", "llama", {"mlp_bias": False}, {}),
    ("linear-rope", "llama", {}, {}),
    ("qwen2", "qwen2", {}, {}),
    ("qwen3", "qwen3", {}, {}),
    ("yarn-rope", "qwen3", {}, {}),
    ("gemma2", "gemma2", {"query_pre_attn_scalar": 16}, {}),
    (
        "gemma3",
        "gemma3",
        {"query_pre_attn_scalar": 16},
        {"gemma3.attention.sliding_window_pattern": 3, "gemma3.rope.freq_base_swa": 100.0},
    ),
    ("phi3-window", "phi3", {}, {}),
    ("phi3-longrope", "phi3", {}, {}),
    ("olmo2", "olmo2", {}, {}),
    ("granite", "granite", {"mlp_bias": False}, {}),
    ("smollm3", "smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 4}, {}),
    ("mixtral", "llama", {}, {}),
    ("qwen2-moe", "qwen2moe", {"mlp_only_layers": []}, {}),
    ("qwen3-moe", "qwen3moe", {"decoder_sparse_step": 1}, {}),
]


@pytest.mark.parametrize(("family", "arch", "changes", "extra"), CONVERTED)
def test_a_converted_model_is_the_model(
    tmp_path: Path, family: str, arch: str, changes: dict[str, Any], extra: dict[str, Any]
) -> None:
    reference, original = build(family, **changes).bfloat16().float(), tmp_path / "original"
    reference.save_pretrained(original)
    directory = resolve(str(write(tmp_path / "tiny.gguf", reference, arch, extra)))
    ids = [5, 9, 33, 2, 71, 8, 1, 4, 90]
    (ours,) = PagedSequences(load(directory, torch.bfloat16)).step({"a": ids})
    (same,) = PagedSequences(load(original, torch.bfloat16)).step({"a": ids})
    assert torch.equal(ours, same)
    spec, expected = ModelSpec.from_dir(directory), ModelSpec.from_dir(original)
    assert replace(spec, pad_id=None) == replace(
        expected, dtype="bfloat16", eos_ids=(0,), bos_id=1, pad_id=None
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_models_are_dequantised(tmp_path: Path, kind: str) -> None:
    quantise = Quantise[kind]
    model = build(
        "mixtral" if kind == "Q8_0" else "llama", hidden_size=64, num_attention_heads=2, intermediate_size=96
    )
    directory = resolve(str(write(tmp_path / "a.gguf", model, "llama", quantise=quantise)))
    stored = load_file(directory / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name in stored and weight.dim() == 2:
            steps = {"Q4": 8, "Q5": 16, "Q8": 128, "BF": 256, "F1": 256}[kind[:2]]
            error = (stored[name].float() - weight).abs().amax() / weight.abs().amax()
            assert 0 < error < 1 / steps, name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_of_single_and_stacked_matrices(tmp_path: Path, kind: str) -> None:
    """Bytes at random, which the gguf package reads its way."""
    block, size = gguf.GGML_QUANT_SIZES[Quantise[kind]]
    packed = np.random.default_rng(1).integers(0, 60, (3, 4, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_up_exps.weight", packed, raw_dtype=Quantise[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "k.gguf")
    family = family_of(file)
    weights = list(converter.weights(file, family))
    assert [w.name for w in weights] == [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(3)]
    for e, weight in enumerate(weights):
        expected = torch.from_numpy(gguf.quants.dequantize(packed[e], Quantise[kind]))
        read = converter.read(file, family, weight)
        assert read.shape == (4, 2 * block) and weight.nbytes == read.numel() * 2
        assert torch.equal(read, expected.to(torch.bfloat16)) and read.float().std() > 0


def test_llama3_scaling_is_found_again_from_its_divisors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=97, max_position_embeddings=131072, rope_parameters=rope
    )
    model = transformers.LlamaForCausalLM(config)
    spec = ModelSpec.from_dir(resolve(str(write(tmp_path / "a.gguf", model, "llama"))))
    assert (
        spec.ropes == ModelSpec.from_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}).ropes
    )
    odd = transformers.LlamaConfig.from_dict(
        config.to_dict() | {"rope_parameters": rope | {"low_freq_factor": 2.0}}
    )
    path = write(tmp_path / "b.gguf", transformers.LlamaForCausalLM(odd), "llama")
    with pytest.raises(ModelError, match="rotary embeddings in a way"):
        resolve(str(path))


def test_tokenizer_of_a_file(tiny: Tiny, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], "llama", {"tokenizer.ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_dir(resolve(str(path)))
    assert tokenizer.vocab_size == len(TOKENS)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.special_ids == {0, 1}
    ids = tokenizer.encode("x the<|end|><tool>\n\n1")
    assert [tokenizer.id_to_piece(i) for i in ids] == [
        "<|start|>",
        "x",
        "Ġthe",
        "<|end|>",
        "<tool>",
        "ĊĊ",
        "1",
    ]
    assert tokenizer.decode(ids) == "x the<tool>\n\n1"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "he"}])
    assert prompt.text == "he<|end|>"
    assert [tokenizer.id_to_piece(i) for i in prompt.token_ids] == ["he", "<|end|>"]


@pytest.mark.parametrize(
    ("family", "arch", "word"),
    [
        ("smollm", "llama", "▁the"),
        ("phi3", "phi3", "▁the"),
        ("gemma2", "gemma2", "the"),
        ("gemma3", "gemma3", "the"),
    ],
)
def test_sentencepiece_tokenizer_of_a_file(
    tiny: Tiny, tmp_path: Path, family: str, arch: str, word: str
) -> None:
    """Gemma puts no space before a text."""
    extra = {"tokenizer.ggml.add_bos_token": True}
    path = write(tmp_path / "a.gguf", tiny(family)[0], arch, extra, pre="sentencepiece")
    tokenizer = Tokenizer.from_dir(resolve(str(path)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("the é</s>")
    assert [tokenizer.id_to_piece(i) for i in ids] == ["<s>", word, "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(ids) == "the é"
    assert tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ċ", "Ċ", "123"]),
        ("smollm", ["ĊĊ", "1", "2", "3"]),
        ("qwen2", ["ĊĊ", "1", "2", "3"]),
        ("llama-bpe", ["ĊĊ", "123"]),
        ("refact", ["ĊĊ", "1", "2", "3"]),
        ("dbrx", ["ĊĊ", "123"]),
        ("tekken", ["ĊĊ", "1", "2", "3"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(
    tiny: Tiny, tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], "llama", pre=pre)
    tokenizer = Tokenizer.from_dir(resolve(str(path)))
    assert tokenizer.backend.pre_tokenizer is not None
    assert [p for p, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("\n\n123")] == pieces


@pytest.mark.parametrize(
    ("arch", "extra", "pre", "message"),
    [
        ("mamba", {}, "smollm", "architecture 'mamba'"),
        ("llama", {"llama.expert_count": 8}, "smollm", "expert_used_count"),
        ("llama", {"split.count": 3}, "smollm", "one of 3 parts"),
        (
            "llama",
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
            "smollm",
            "rotary embeddings by longrope",
        ),
        ("llama", {"llama.rope.dimension_count": 4}, "smollm", "turns 4 of a head's 8"),
        ("llama", {}, "klingon", "pre-tokenizer 'klingon'"),
    ],
)
def test_refusals(
    tiny: Tiny, tmp_path: Path, arch: str, extra: dict[str, Any], pre: str, message: str
) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], arch, extra, pre)
    with pytest.raises(ModelError, match=message):
        resolve(str(path))
    assert not list((tmp_path / "cache").rglob("*.json"))  # nothing half-built is left


def test_damaged_files(tiny: Tiny, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], "llama")
    whole = path.read_bytes()
    for size in (4, 30, 4000, len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            resolve(str(path))
    path.write_text("hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve(str(path))


def test_large_models_are_written_in_shards(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.gguf", tiny("qwen3")[0], "qwen3")
    whole = load(resolve(str(path)), torch.bfloat16)
    monkeypatch.setattr(converter, "SHARD_BYTES", 30_000)
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "other"))
    reports: list[tuple[int, int]] = []
    sharded = resolve(str(path), progress=lambda done, total: reports.append((done, total)))
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ids = [4, 5, 6]
    assert torch.equal(
        PagedSequences(load(sharded, torch.bfloat16)).step({"a": ids})[0],
        PagedSequences(whole).step({"a": ids})[0],
    )
    assert reports[0] == (0, whole.spec.weight_bytes("bfloat16"))
    assert reports[-1][0] == reports[-1][1]


def test_smollm2_as_converted(smollm2: Path) -> None:
    spec = ModelSpec.from_dir(smollm2)
    assert spec.num_parameters == 134_515_008
    assert spec.eos_ids == (2,)
    assert (spec.norm_eps, spec.ropes[0].theta, spec.tied_embeddings) == (1e-5, 100000.0, True)
    assert json.loads((smollm2 / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = Tokenizer.from_dir(smollm2)
    assert (tokenizer.id_to_piece(2), tokenizer.eos_id) == ("<|im_end|>", 2)
    # SmolLM2 was trained with digits split off first: two newlines before one stay a single token.
    assert [tokenizer.id_to_piece(i) for i in tokenizer.encode("a\n\n12")] == ["a", "ĊĊ", "1", "2"]


def test_gemma3_as_converted(tmp_path: Path) -> None:
    """The real Gemma-3-270M in Q4_K_M, beyond its window of 512 tokens, against transformers."""
    path = os.environ.get("LLMTOOL_GEMMA3_GGUF")
    if not path:
        pytest.skip("LLMTOOL_GEMMA3_GGUF names no file")
    directory = resolve(path)
    spec = ModelSpec.from_dir(directory)
    assert spec.num_parameters == 268_098_176
    assert spec.windows == ((512,) * 5 + (None,)) * 3
    tokenizer = Tokenizer.from_dir(directory)
    text = "The sea was calm. " * 130 + "The capital of France is"
    ids = tokenizer.encode(text)
    assert ids[0] == spec.bos_id and len(ids) > 600 and tokenizer.decode(ids) == text
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    ours = PagedSequences(load(directory, torch.float32), tokens_per_page=16, num_pages=64)
    logits = torch.cat([ours.step({"a": ids[i : i + 200]})[0] for i in range(0, len(ids), 200)])
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)
    assert tokenizer.decode([int(logits[-1].argmax())]).strip() == "Paris"
