"""ModelSpec from raw configurations, in both of transformers' spellings, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtool.errors import ModelError
from llmtool.modelspec import AttentionSpec, DenseSpec, ModelSpec, RopeSpec
from tests.modelspec.published import LLAMA_31_8B, MISTRAL_7B_V01, PUBLISHED, QWEN3_8B, QWEN25_7B


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models(name: str) -> None:
    config, parameters, kv_bytes, full, sliding, window = PUBLISHED[name]
    spec = ModelSpec.from_config(config)
    assert spec.num_parameters == parameters
    assert spec.weight_bytes("bfloat16") == 2 * parameters
    assert spec.weight_bytes("float32") == 4 * parameters
    caches = spec.layer_cache_specs(2)
    assert [cache.layer for cache in caches] == list(range(full + sliding))
    assert {cache.bytes_per_token for cache in caches} == {kv_bytes}
    assert [spec.windows.count(None), len(spec.windows) - spec.windows.count(None)] == [full, sliding]
    assert set(spec.windows) - {None} == ({window} if window else set())
    kinds = [
        "mla" if spec.attention.latent else "full" if w is None else "sliding_window" for w in spec.windows
    ]
    assert [cache.kind for cache in caches] == kinds


def test_order_of_full_and_sliding_layers() -> None:
    windows = {name: ModelSpec.from_config(PUBLISHED[name][0]).windows for name in PUBLISHED}
    assert windows["Gemma-2-9B"] == (4096, None) * 21
    assert windows["Gemma-3-27B"] == ((1024,) * 5 + (None,)) * 10 + (1024, 1024)
    assert windows["gpt-oss-20b"] == (128, None) * 12


def test_llama_fields() -> None:
    spec = ModelSpec.from_config(LLAMA_31_8B)
    assert spec.family == "llama"
    assert spec.head_dim == 128
    assert spec.ropes == (RopeSpec(128, 500000.0, "llama3", 8.0, 8192),)
    assert spec.eos_ids == (128001, 128008, 128009)
    assert (spec.bos_id, spec.pad_id) == (128000, None)
    assert spec.dtype == "bfloat16"
    assert spec.max_positions == 131072
    assert spec.attention == AttentionSpec(32, 8, 128, 128**-0.5)
    assert {layer.mlp for layer in spec.layers} == {DenseSpec(14336)}
    assert not spec.tied_embeddings


def test_family_traits() -> None:
    qwen2, qwen3 = ModelSpec.from_config(QWEN25_7B), ModelSpec.from_config(QWEN3_8B)
    traits = [(s.attention.qkv_bias, s.attention.o_bias, s.attention.qk_norm) for s in (qwen2, qwen3)]
    assert traits == [(True, False, None), (False, False, "head")]
    biased = ModelSpec.from_config({**LLAMA_31_8B, "attention_bias": True, "mlp_bias": True})
    assert (biased.attention.qkv_bias, biased.attention.o_bias) == (True, True)
    assert {layer.mlp for layer in biased.layers} == {DenseSpec(14336, bias=True)}


@pytest.mark.parametrize("config", [LLAMA_31_8B, QWEN25_7B])
def test_both_spellings_mean_the_same(config: dict[str, Any]) -> None:
    new = dict(config)
    scaling = new.pop("rope_scaling", None) or {"rope_type": "default"}
    new["rope_parameters"] = {**scaling, "rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    assert ModelSpec.from_config(new) == ModelSpec.from_config(config)


def test_linear_rope_with_the_oldest_spelling() -> None:
    spec = ModelSpec.from_config({**MISTRAL_7B_V01, "rope_scaling": {"type": "linear", "factor": 2}})
    assert spec.ropes == (RopeSpec(128, 10000.0, "linear", 2.0),)


def test_windows() -> None:
    assert set(ModelSpec.from_config(MISTRAL_7B_V01).windows) == {4096}
    assert set(ModelSpec.from_config({**MISTRAL_7B_V01, "sliding_window": None}).windows) == {None}
    assert set(ModelSpec.from_config(QWEN25_7B).windows) == {None}
    some = {**QWEN25_7B, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 20}
    assert ModelSpec.from_config(some).windows == (None,) * 20 + (100,) * 8
    types = ["full_attention", "sliding_attention"] * 14
    listed = ModelSpec.from_config({**some, "layer_types": types})
    assert listed.windows == (None, 100) * 14
    assert [c.kind for c in listed.layer_cache_specs(2)] == ["full", "sliding_window"] * 14


def test_end_tokens_of_both_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_7B))
    assert ModelSpec.from_dir(tmp_path).eos_ids == (151645,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151643, 151645]}))
    assert ModelSpec.from_dir(tmp_path).eos_ids == (151643, 151645)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel does not run"),
        ({"architectures": None, "model_type": "mamba"}, "mamba does not run"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, and is missing"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers must be a positive integer, and is '32'"),
        ({"vocab_size": -5}, "vocab_size must be a positive integer, and is -5"),
        ({"num_key_value_heads": 5}, r"\(32\) is not a multiple of num_key_value_heads \(5\)"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number, and is 'tiny'"),
        ({"hidden_act": "relu2"}, "activation 'relu2' does not run"),
        ({"rope_scaling": {"rope_type": "axial", "factor": 4.0}}, "rope type 'axial' does not run"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a number, and is missing"),
        ({"partial_rotary_factor": 0.12}, r"partial_rotary_factor is 0\.12, which turns 15 of 128"),
    ],
)
def test_refusals_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config({**LLAMA_31_8B, **change})


def test_layer_types_must_fit() -> None:
    with pytest.raises(ModelError, match="28 layers, and has 2 entries with linear_attention"):
        ModelSpec.from_config(
            {**QWEN25_7B, "use_sliding_window": True, "layer_types": ["full_attention", "linear_attention"]}
        )


def test_an_unknown_architecture_lists_what_runs() -> None:
    with pytest.raises(ModelError) as error:
        ModelSpec.from_config({"architectures": ["MambaForCausalLM"]})
    assert (
        "LlamaForCausalLM, MinistralForCausalLM, MistralForCausalLM, MixtralForCausalLM" in error.value.remedy
    )


def test_unreadable_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ModelSpec.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        ModelSpec.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        ModelSpec.from_dir(tmp_path)


def test_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, llmtool.modelspec; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
