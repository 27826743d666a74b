"""What tells the families apart, read from their config.json in either spelling; and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import transformers

from llmtool.errors import ModelError
from llmtool.modelspec import DenseSpec, GateSpec, LatentSpec, ModelSpec, MoESpec, RopeSpec, RouterSpec
from llmtool.modelspec.families import FAMILIES
from llmtool.modelspec.read import TEXT_PARTS
from tests.modelspec.published import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GEMMA2_9B,
    GEMMA3_27B,
    GPT_OSS_20B,
    GRANITE_31_2B,
    LLAMA_31_8B,
    MIXTRAL_8X7B,
    PHI3_MINI,
    PUBLISHED,
    QWEN3_30B_A3B,
    QWEN15_MOE,
    SMOLLM3_3B,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_5_saves_means_the_same(name: str) -> None:
    """transformers reads the published file, fills in its defaults, and writes its own spelling."""
    config = PUBLISHED[name][0]
    architecture = config["architectures"][0]
    family = FAMILIES[TEXT_PARTS.get(architecture, architecture)]
    fields = {
        k: v for k, v in config.items() if k not in ("architectures", "quantization_config", "model_type")
    }
    if architecture in TEXT_PARTS:
        fields = {k: v for k, v in config["text_config"].items() if k != "model_type"}
    saved = transformers.AutoConfig.for_model(family.name, **fields).to_dict()
    ours = ModelSpec.from_config(config)
    theirs = ModelSpec.from_config({**saved, "architectures": [architecture]})
    same = {
        "dtype": "",
        "eos_ids": (),
        "bos_id": None,
        "pad_id": None,
    }  # transformers has defaults of its own
    assert replace(theirs, **same) == replace(ours, **same)
    assert theirs.max_positions == saved["max_position_embeddings"]


def test_gemma() -> None:
    two, three = ModelSpec.from_config(GEMMA2_9B), ModelSpec.from_config(GEMMA3_27B)
    assert (two.norms.before, two.norms.after, two.norms.offset) == (True, True, 1.0)
    assert (two.attention.scale, two.attention.softcap, two.logits_softcap) == (1 / 16, 50.0, 30.0)
    assert two.embedding_scale == math.sqrt(3584)
    assert two.layers[0].mlp == DenseSpec(14336, GateSpec("gelu_tanh"))
    assert two.tied_embeddings and three.tied_embeddings
    assert (two.attention.qk_norm, three.attention.qk_norm) == (None, "head")
    assert (three.attention.scale, three.attention.softcap) == (168**-0.5, None)
    local, far = RopeSpec(128, 10000.0), RopeSpec(128, 1e6, "linear", 8.0)
    assert [layer.rope for layer in three.layers[:7]] == [local] * 5 + [far, local]
    assert three.eos_ids == (1, 106)


def test_multipliers_of_granite() -> None:
    spec = ModelSpec.from_config(GRANITE_31_2B)
    assert (spec.attention.scale, spec.embedding_scale) == (0.015625, 12.0)
    assert (spec.residual_scale, spec.logits_divisor) == (0.22, 8.0)


def test_layers_without_rotary_embedding() -> None:
    spec = ModelSpec.from_config(SMOLLM3_3B)
    assert [layer.rope is None for layer in spec.layers] == [False, False, False, True] * 9
    chosen = ModelSpec.from_config({**SMOLLM3_3B, "no_rope_layers": [1] * 35 + [0]})
    assert [layer.rope is None for layer in chosen.layers] == [False] * 35 + [True]


def test_mixtures() -> None:
    mixtral, qwen2, qwen3 = (
        ModelSpec.from_config(c).layers[0].mlp for c in (MIXTRAL_8X7B, QWEN15_MOE, QWEN3_30B_A3B)
    )
    assert mixtral == MoESpec(RouterSpec(8, 2, normalised=True), 14336)
    assert qwen2 == MoESpec(RouterSpec(60, 4), 1408, shared_size=5632, shared_gate=True)
    assert qwen3 == MoESpec(RouterSpec(128, 8, normalised=True), 768)
    sparse = ModelSpec.from_config({**QWEN3_30B_A3B, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [isinstance(layer.mlp, MoESpec) for layer in sparse.layers[:6]] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    gpt_oss = ModelSpec.from_config(GPT_OSS_20B)
    assert gpt_oss.layers[0].mlp == MoESpec(
        RouterSpec(32, 4, normalised=True, bias=True), 2880, GateSpec("clamped", 1.702, 7.0), bias=True
    )
    assert gpt_oss.attention.sinks and gpt_oss.attention.qkv_bias and gpt_oss.attention.o_bias


def test_latent_attention() -> None:
    lite, v3 = ModelSpec.from_config(DEEPSEEK_V2_LITE), ModelSpec.from_config(DEEPSEEK_V3)
    assert lite.attention.latent == LatentSpec(None, 512, 128, 64, 128)
    assert v3.attention.latent == LatentSpec(1536, 512, 128, 64, 128)
    assert (v3.attention.num_kv_heads, v3.attention.head_dim) == (1, 576)
    assert {(c.k_head_dim, c.v_head_dim) for c in v3.layer_cache_specs(2)} == {(576, 0)}
    assert lite.attention.scale == 192**-0.5
    # As published in DeepSeek's own code: softmax_scale * (0.1 * ln 40 + 1) ** 2
    assert v3.attention.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert v3.ropes[0].attention_factor == 1.0
    router = RouterSpec(256, 8, "sigmoid", True, 2.5, 8, 4, "top2", correction=True)
    assert v3.layers[3].mlp == MoESpec(router, 2048, shared_size=2048)
    assert {layer.mlp for layer in v3.layers[:3]} == {DenseSpec(18432)}
    assert lite.layers[1].mlp == MoESpec(RouterSpec(64, 6), 1408, shared_size=2816)


def test_width_of_a_token() -> None:
    """The neurons one token passes in the widest layer: what a step's memory follows."""
    assert ModelSpec.from_config(LLAMA_31_8B).intermediate_size == 14336
    assert ModelSpec.from_config(MIXTRAL_8X7B).intermediate_size == 2 * 14336
    assert ModelSpec.from_config(QWEN15_MOE).intermediate_size == 4 * 1408 + 5632
    assert ModelSpec.from_config(DEEPSEEK_V3).intermediate_size == 8 * 2048 + 2048


def test_rotary_embeddings_of_long_contexts() -> None:
    gpt_oss = ModelSpec.from_config(GPT_OSS_20B).ropes[0]
    assert (gpt_oss.kind, gpt_oss.factor, gpt_oss.original_max_positions) == ("yarn", 32.0, 4096)
    assert (gpt_oss.truncate, gpt_oss.attention_factor) == (False, pytest.approx(0.1 * math.log(32) + 1))
    long: dict[str, Any] = {
        **PHI3_MINI,
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }
    rope = ModelSpec.from_config(long).ropes[0]
    assert (rope.kind, rope.dim, rope.original_max_positions) == ("longrope", 96, 4096)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    part = {**long, "partial_rotary_factor": 0.75}
    with pytest.raises(ModelError, match="short_factor must be a list of 36 numbers"):
        ModelSpec.from_config(part)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (GEMMA2_9B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, r"topk_method\) 'noaux_tc' does not run"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob is True"),
        (DEEPSEEK_V3, {"n_group": 7}, "256 experts cannot come in 7 equal groups"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, r"scoring_func\) 'softmax' does not run"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of 8 experts"),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of 36 integers"),
        # transformers does not look at it, and others do: what the model was trained with cannot be known.
        (
            LLAMA_31_8B,
            {"partial_rotary_factor": 0.5},
            "turns 64 of 128 dimensions, and llama models turn them all",
        ),
        (LLAMA_31_8B, {"quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
        (
            LLAMA_31_8B,
            {"quantization_config": {"quant_method": "fp8"}},
            "quantised with fp8 in blocks of None",
        ),
    ],
)
def test_refusals_name_what_is_wrong(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config({**config, **change})
