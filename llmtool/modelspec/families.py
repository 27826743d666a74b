"""The families of decoders that run natively: what tells each from Llama.

Sources: the configuration and model classes of transformers 5, whose defaults stand where config.json is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtool.modelspec import mixers
from llmtool.modelspec.config import Config, numbers
from llmtool.modelspec.mlps import (
    MlpSpec,
    deepseek_v2_mlps,
    deepseek_v3_mlps,
    dense,
    gpt_oss_mlps,
    mixtral_mlps,
    qwen_mlps,
)
from llmtool.modelspec.parts import MixerSpec, RopeSpec
from llmtool.modelspec.rope import FULL, SLIDING, read_ropes, rope, yarn_magnitude


@dataclass(frozen=True, slots=True)
class Scales:
    """Constants that stand in the way of a plain Llama. attention: None is 1 / sqrt(head_dim). folded: see
    ModelSpec."""

    attention: float | None = None
    attention_softcap: float | None = None
    embedding: float = 1.0
    residual: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    folded: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from Llama. defaults: what its configuration class assumes where config.json is silent.

    norm_before, norm_after, norm_offset: see NormSpec. bias: the field that says whether q, k, v and o have biases;
    qkv_bias and o_bias overrule it. latent: attention is DeepSeek's. types: full or sliding attention, per layer.
    ropes: the rotary embedding of each of these types; partial: it may turn a part of a head; rotated: per layer,
    whether it has one. mlps: per layer. mixers: per layer, what it has with a state. eps: the field of the norms'
    epsilon. refused: fields that must not be set.
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_before: bool = True
    norm_after: bool = False
    norm_offset: float = 0.0
    bias: str = "attention_bias"
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: str | None = None
    sinks: bool = False
    latent: bool = False
    types: Callable[[Config, int], Sequence[str]] = lambda config, layers: [FULL] * layers
    ropes: Callable[[Config, int], Mapping[str, RopeSpec]] = read_ropes
    partial: bool = False
    rotated: Callable[[Config, int], Sequence[int]] = lambda config, layers: [1] * layers
    mlps: Callable[[Config, int], Sequence[MlpSpec]] = dense
    mixers: Callable[[Config, Sequence[str]], Sequence[MixerSpec | None]] = mixers.none
    eps: str = "rms_norm_eps"
    scales: Callable[[Config, RopeSpec], Scales] = lambda config, rope: Scales()
    refused: tuple[str, ...] = ()


# -- which layers slide ------------------------------------------------------------------------------------------


def _all_slide(config: Config, layers: int) -> Sequence[str]:
    return config.layer_types(layers) or [SLIDING] * layers


def _last_slide(config: Config, layers: int) -> Sequence[str]:
    """Qwen2, Qwen3: layers from max_window_layers on."""
    if not config.flag("use_sliding_window"):
        return [FULL] * layers
    full = int(config.number("max_window_layers", 28))
    return config.layer_types(layers) or [FULL if i < full else SLIDING for i in range(layers)]


def _first_of_pairs_slide(config: Config, layers: int) -> Sequence[str]:
    """Qwen2-MoE: every other layer up to max_window_layers."""
    if not config.flag("use_sliding_window"):
        return [FULL] * layers
    last = int(config.number("max_window_layers", 28))
    pattern = [SLIDING if i % 2 == 0 and i < last else FULL for i in range(layers)]
    return config.layer_types(layers) or pattern


def _slide_if_used(config: Config, layers: int) -> Sequence[str]:
    return [SLIDING if config.flag("use_sliding_window") else FULL] * layers


def _every_nth_full(config: Config, layers: int) -> Sequence[str]:
    """Gemma-2, gpt-oss: every other layer is full; Gemma-3: every sixth."""
    period = config.count("sliding_window_pattern")
    return config.layer_types(layers) or [SLIDING if (i + 1) % period else FULL for i in range(layers)]


def _unrotated_slide(config: Config, layers: int) -> Sequence[str]:
    """SmolLM3: layers without rotary embedding, where sliding windows are on at all."""
    if not config.flag("use_sliding_window"):
        return [FULL] * layers
    return config.layer_types(layers) or [FULL if turned else SLIDING for turned in _rotated(config, layers)]


# -- rotary embeddings that differ by layer ----------------------------------------------------------------------


def _rotated(config: Config, layers: int) -> Sequence[int]:
    """SmolLM3: 1 for layers with rotary embedding; by default every fourth has none."""
    interval = config.count("no_rope_layer_interval", 4)
    return config.integers("no_rope_layers", layers) or [int((i + 1) % interval != 0) for i in range(layers)]


def _local_and_global(config: Config, head_dim: int) -> Mapping[str, RopeSpec]:
    """Gemma-3: sliding layers have a base of their own, and only full ones are scaled."""
    new, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    bases = {FULL: config.number("rope_theta", 1e6), SLIDING: config.number("rope_local_base_freq", 1e4)}
    tables = {FULL: {**(new.get(FULL) or {}), **scaling}, SLIDING: new.get(SLIDING) or {}}
    return {kind: rope(config, {"rope_theta": bases[kind], **tables[kind]}, head_dim) for kind in bases}


# -- constants ---------------------------------------------------------------------------------------------------


def _gemma_scales(config: Config, rope: RopeSpec) -> Scales:
    return Scales(
        attention=config.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=config.optional_number("attn_logit_softcapping"),
        embedding=config.count("hidden_size") ** 0.5,
        logits_softcap=config.optional_number("final_logit_softcapping"),
    )


def _granite_scales(config: Config, rope: RopeSpec) -> Scales:
    return Scales(
        attention=config.number("attention_multiplier"),
        embedding=config.number("embedding_multiplier"),
        residual=config.number("residual_multiplier"),
        logits_divisor=config.number("logits_scaling"),
    )


def _deepseek_scales(config: Config, rope: RopeSpec) -> Scales:
    """Long contexts sharpen attention by yarn's magnitude, squared, where mscale_all_dim says so."""
    head = config.count("qk_nope_head_dim") + config.count("qk_rope_head_dim")
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    weight = table.get("mscale_all_dim") if rope.kind != "default" else None
    return Scales(attention=head**-0.5 * (yarn_magnitude(rope.factor, weight) ** 2 if weight else 1.0))


def _falcon_scales(config: Config, rope: RopeSpec) -> Scales:
    """Falcon-H1's multipliers: all but two are of a matrix's input or output, and so of the matrix."""
    into, out = config.number("attention_in_multiplier", 1.0), config.number("attention_out_multiplier", 1.0)
    gate, down = numbers(config.fields, "mlp_multipliers", 2) if config.get("mlp_multipliers") else (1.0, 1.0)
    return Scales(
        embedding=config.number("embedding_multiplier", 1.0),
        logits_divisor=1.0 / config.number("lm_head_multiplier", 1.0),
        folded=(
            ("self_attn.q_proj.weight", into),
            ("self_attn.k_proj.weight", into * config.number("key_multiplier", 1.0)),
            ("self_attn.v_proj.weight", into),
            ("self_attn.o_proj.weight", out),
            ("mlp.gate_proj.weight", gate),
            ("mlp.down_proj.weight", down),
            ("mamba.out_proj.weight", config.number("ssm_out_multiplier", 1.0)),
        ),
    )


# -- the families ------------------------------------------------------------------------------------------------

_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_MOE_WINDOW = {"sliding_window": 4096, "use_sliding_window": False}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", {"max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(
        "mistral",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        types=_all_slide,
    ),
    "MinistralForCausalLM": Family(
        "ministral",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        types=_all_slide,
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        qkv_bias=True,
        o_bias=False,
        types=_last_slide,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
        qk_norm="head",
        types=_last_slide,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "vocab_size": 256000,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        norm_after=True,
        norm_offset=1.0,
        types=_every_nth_full,
        scales=_gemma_scales,
        refused=("use_bidirectional_attention",),
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        {**_GEMMA, "max_position_embeddings": 131072, "vocab_size": 262208, "sliding_window_pattern": 6},
        norm_after=True,
        norm_offset=1.0,
        qk_norm="head",
        types=_every_nth_full,
        ropes=_local_and_global,
        scales=_gemma_scales,
        refused=("use_bidirectional_attention", "attn_logit_softcapping"),
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
        },
        qkv_bias=False,
        o_bias=False,
        partial=True,
        types=_all_slide,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279},
        norm_before=False,
        norm_after=True,
        qk_norm="all",
    ),
    "GraniteForCausalLM": Family(
        "granite",
        {
            "max_position_embeddings": 2048,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        scales=_granite_scales,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        types=_unrotated_slide,
        rotated=_rotated,
    ),
    "Lfm2ForCausalLM": Family(
        "lfm2",
        {
            "max_position_embeddings": 128000,
            "num_key_value_heads": 8,
            "norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "conv_L_cache": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        qkv_bias=False,
        o_bias=False,
        qk_norm="head",
        types=mixers.lfm2_types,
        mlps=mixers.lfm2_mlps,
        mixers=mixers.lfm2_mixers,
        eps="norm_eps",
    ),
    "FalconH1ForCausalLM": Family(
        "falcon_h1",
        {
            "max_position_embeddings": 8192,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "mamba_d_ssm": 1024,
            "mamba_n_heads": 128,
            "mamba_d_head": "auto",
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        scales=_falcon_scales,
        mixers=mixers.falcon_mixers,
        refused=("attention_bias",),
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        types=_all_slide,
        mlps=mixtral_mlps,
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        {
            **_MOE_WINDOW,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        bias="qkv_bias",
        o_bias=False,
        types=_first_of_pairs_slide,
        mlps=qwen_mlps,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        {
            **_MOE_WINDOW,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qk_norm="head",
        types=_slide_if_used,
        mlps=qwen_mlps,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },
        sinks=True,
        types=_every_nth_full,
        mlps=gpt_oss_mlps,
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2",
        {
            "max_position_embeddings": 2048,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1407,
            "topk_method": "greedy",
        },
        latent=True,
        mlps=deepseek_v2_mlps,
        scales=_deepseek_scales,
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        {
            "max_position_embeddings": 4096,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "rope_interleave": True,
        },
        latent=True,
        mlps=deepseek_v3_mlps,
        scales=_deepseek_scales,
    ),
}
