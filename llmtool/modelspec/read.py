"""A parsed config.json -> ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtool.errors import ModelError
from llmtool.modelspec.config import Config, token_ids
from llmtool.modelspec.families import FAMILIES, Family, Scales
from llmtool.modelspec.mixers import CONV
from llmtool.modelspec.parts import AttentionSpec, LatentSpec, LayerSpec, NormSpec
from llmtool.modelspec.per_layer import read_per_layer
from llmtool.modelspec.rope import FULL, SLIDING
from llmtool.modelspec.spec import DTYPE_BYTES, ModelSpec

# Models of text and images of which the text part is a family here: it runs, and images are not read.
TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
# Quantised checkpoints whose weights can be made plain while they are loaded.
DEQUANTISED = ("mxfp4", "fp8")


def read_spec(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec:
    """Raises ModelError for an architecture or feature that does not run, or a field that makes no sense."""
    architecture = architecture_of(config)
    if architecture not in FAMILIES and architecture not in TEXT_PARTS:
        raise ModelError(
            f"The architecture {architecture} does not run here.", f"These do: {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[TEXT_PARTS.get(architecture, architecture)]
    if architecture in TEXT_PARTS:
        outer = {key: value for key, value in config.items() if key not in ("text_config", "vision_config")}
        config = {**outer, **(config.get("text_config") or {})}
    return _read(Config(config, family.defaults), architecture, family, generation)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class the model is saved under; where config.json does not name it, the one of its model_type."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    by_type = {family.name: architecture for architecture, family in FAMILIES.items()}
    return by_type.get(str(config.get("model_type")), str(config.get("model_type")))


def _read(config: Config, architecture: str, family: Family, generation: Mapping[str, Any]) -> ModelSpec:
    config.refuse(*family.refused)
    _check_quantisation(config)
    layers, types = _layers(config, family)
    latent = _latent(config) if family.latent else None
    head_dim = 0 if latent else config.count("head_dim", _per_head(config))
    ropes = family.ropes(config, latent.rope_dim if latent else head_dim)
    whole = latent.rope_dim if latent else head_dim
    if not family.partial and any(rope.dim != whole for rope in ropes.values()):
        raise ModelError(
            f"config.json: partial_rotary_factor turns {ropes[FULL].dim} of {whole} dimensions, and {family.name} "
            "models turn them all.",
            "Take it out of config.json if the model was trained without it.",
        )
    scales = family.scales(config, ropes[FULL])
    window = config.optional_count("sliding_window") if SLIDING in types else None
    rotated, mlps = family.rotated(config, layers), family.mlps(config, layers)
    attention = _attention(config, family, scales, head_dim, latent)
    mixers = family.mixers(config, types)
    own = read_per_layer(config, attention, mlps)
    return ModelSpec(
        architecture=architecture,
        family=family.name,
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        max_positions=config.count("max_position_embeddings"),
        attention=attention,
        norms=NormSpec(
            config.number(family.eps, 1e-6), family.norm_before, family.norm_after, family.norm_offset
        ),
        layers=tuple(
            LayerSpec(
                window if kind == SLIDING else None,
                ropes[kind] if turned and kind != CONV else None,
                mlp,
                replace(attention, num_heads=0, num_kv_heads=0) if kind == CONV else heads,
                mixer,
            )
            for kind, turned, (heads, mlp), mixer in zip(types, rotated, own, mixers, strict=True)
        ),
        tied_embeddings=config.flag("tie_word_embeddings"),
        embedding_scale=scales.embedding,
        residual_scale=scales.residual,
        logits_divisor=scales.logits_divisor,
        logits_softcap=scales.logits_softcap,
        folded=scales.folded,
        dtype=_dtype(config),
        eos_ids=token_ids(generation.get("eos_token_id"), config.get("eos_token_id")),
        bos_id=next(iter(token_ids(config.get("bos_token_id"))), None),
        pad_id=next(iter(token_ids(config.get("pad_token_id"))), None),
    )


def _layers(config: Config, family: Family) -> tuple[int, Sequence[str]]:
    layers = config.count("num_hidden_layers")
    return layers, family.types(config, layers)


def _attention(
    config: Config, family: Family, scales: Scales, head_dim: int, latent: LatentSpec | None
) -> AttentionSpec:
    heads, biased = config.count("num_attention_heads"), config.flag(family.bias)
    if latent:
        kv_heads, head_dim = 1, latent.kv_rank + latent.rope_dim
    else:
        kv_heads = config.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})."
        )
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scales.attention is None else scales.attention,
        qkv_bias=biased if family.qkv_bias is None else family.qkv_bias,
        o_bias=biased if family.o_bias is None else family.o_bias,
        qk_norm=family.qk_norm,
        softcap=scales.attention_softcap,
        sinks=family.sinks,
        latent=latent,
    )


def _latent(config: Config) -> LatentSpec:
    return LatentSpec(
        q_rank=config.optional_count("q_lora_rank"),
        kv_rank=config.count("kv_lora_rank"),
        nope_dim=config.count("qk_nope_head_dim"),
        rope_dim=config.count("qk_rope_head_dim"),
        v_dim=config.count("v_head_dim"),
        interleaved=config.flag("rope_interleave", True),
    )


def _per_head(config: Config) -> int:
    return config.count("hidden_size") // config.count("num_attention_heads")


def _dtype(config: Config) -> str:
    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; old files may have neither and mean float32.
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in DTYPE_BYTES else "bfloat16"


def _check_quantisation(config: Config) -> None:
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method")
    blocks = settings.get("weight_block_size")
    if method == "fp8" and blocks != [128, 128]:
        method = f"fp8 in blocks of {blocks}"
    if method is not None and method not in DEQUANTISED:
        raise ModelError(
            f"The checkpoint is quantised with {method}, which does not run here.",
            "Use the model's unquantised weights; mxfp4 and fp8 in blocks of [128, 128] run too.",
        )
