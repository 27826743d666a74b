"""How llama.cpp stores each family: names of tensors, fields of config.json, and what it changed in the weights.

The inverse of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmtool.errors import ModelError
from llmtool.models.gguf_file import GGUFFile, dequantised, shortest_decimal
from llmtool.models.rope import inverse_frequencies
from llmtool.modelspec import RopeSpec

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_AROUND = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_AFTER}
_LLAMA = {**_BEFORE, **_ATTENTION, **_MLP}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_PHI3 = {
    **_BEFORE,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tensors that hold rotary scaling, and belong into config.json.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

Fields = Callable[[GGUFFile], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class GGUFFamily:
    """architecture: Hugging Face's. blocks: llama.cpp's names in a layer -> Hugging Face's, {} for an expert's
    number. paired: rotary rows of q and k lie in pairs. norm_offset: what norms' weights were raised by. fields:
    of config.json, beside those that all have."""

    architecture: str
    blocks: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    paired: bool = False
    norm_offset: float = 0.0
    fields: Fields = lambda file: {}


def family_of(file: GGUFFile) -> GGUFFamily:
    """Raises ModelError for an architecture that does not run."""
    if file.architecture not in FAMILIES:
        raise ModelError(
            f"The GGUF architecture {file.architecture!r} of {file.path.name} does not run here.",
            f"These do: {', '.join(sorted(FAMILIES))}.",
        )
    if file.architecture == "llama" and file.find("expert_count"):
        return _MIXTRAL_FAMILY
    return FAMILIES[file.architecture]


def rope_parameters(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """As config.json of transformers 5 says it. Raises ModelError for a scaling that does not run."""
    theta = float(file.get("rope.freq_base", 10000.0))
    kind = file.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": theta, **_llama3(file, theta, head_dim)}
    if "rope_factors_long.weight" in file.tensors:
        return {"rope_theta": theta, **_longrope(file)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"{file.path.name} scales its rotary embeddings by {kind}, which does not run here without its factors."
        )
    table = {"rope_theta": theta, "rope_type": kind, "factor": float(file.get("rope.scaling.factor"))}
    if kind == "yarn":
        table["original_max_position_embeddings"] = file.get("rope.scaling.original_context_length")
    return table


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The file stores divisors, not the rule behind them: find the rule, and see that it gives them."""
    divisors = dequantised(file.tensors["rope_freqs.weight"]).flatten()
    rule = RopeSpec(head_dim, theta, "llama3", round(float(divisors.max()), 4))  # stored as float32
    expected = inverse_frequencies(RopeSpec(head_dim, theta)) / inverse_frequencies(rule)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ModelError(f"{file.path.name} scales its rotary embeddings in a way that does not run here.")
    return {
        "rope_type": "llama3",
        "factor": rule.factor,
        "low_freq_factor": rule.low_freq_factor,
        "high_freq_factor": rule.high_freq_factor,
        "original_max_position_embeddings": rule.original_max_positions,
    }


def _longrope(file: GGUFFile) -> dict[str, Any]:
    short, long = (dequantised(file.tensor(f"rope_factors_{kind}.weight")) for kind in ("short", "long"))
    factor = file.find("rope.scaling.attn_factor")
    return {
        "rope_type": "longrope",
        "short_factor": [shortest_decimal(x) for x in short.flatten().tolist()],
        "long_factor": [shortest_decimal(x) for x in long.flatten().tolist()],
        **({} if factor is None else {"attention_factor": float(factor)}),
    }


def _gemma(file: GGUFFile) -> dict[str, Any]:
    """The scale of attention is not in the file: llama.cpp knows the one size of each family that differs."""
    heads, hidden = file.get("attention.head_count"), file.get("embedding_length")
    differs = file.get("block_count") == {"gemma2": 46, "gemma3": 62}[file.architecture]
    return {
        "query_pre_attn_scalar": hidden // heads if differs else file.get("attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.get("attention.sliding_window"),
        "final_logit_softcapping": file.find("final_logit_softcapping"),
        "attn_logit_softcapping": file.find("attn_logit_softcapping"),
    }


def _gemma3(file: GGUFFile) -> dict[str, Any]:
    far = rope_parameters(file, file.get("attention.key_length"))
    near = {"rope_type": "default", "rope_theta": float(file.get("rope.freq_base_swa", 10000.0))}
    ropes = {"full_attention": far, "sliding_attention": near}
    return {**_gemma(file), "model_type": "gemma3_text", "rope_parameters": ropes, **_layer_types(file)}


def _layer_types(file: GGUFFile) -> dict[str, Any]:
    """Which layers slide: as newer files list it, else as the family's configuration assumes."""
    pattern = file.find("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    return {} if pattern is None else {"sliding_window_pattern": int(pattern)}


def _phi3(file: GGUFFile) -> dict[str, Any]:
    return {
        "sliding_window": file.find("attention.sliding_window") or None,
        "original_max_position_embeddings": file.get(
            "rope.scaling.original_context_length", file.get("context_length")
        ),
    }


def _granite(file: GGUFFile) -> dict[str, Any]:
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return {name: file.decimal(key) for name, key in keys.items() if file.find(key) is not None}


def _moe(file: GGUFFile) -> dict[str, Any]:
    return {
        "num_experts": file.get("expert_count"),
        "num_experts_per_tok": file.get("expert_used_count"),
        "moe_intermediate_size": file.get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": file.find("expert_shared_feed_forward_length"),
        "norm_topk_prob": file.architecture == "qwen3moe",  # as published, and as llama.cpp assumes
    }


_MIXTRAL_FAMILY = GGUFFamily(
    "MixtralForCausalLM",
    {**_BEFORE, **_ATTENTION, **_MIXTRAL},
    paired=True,
    fields=lambda file: {
        "num_local_experts": file.get("expert_count"),
        "num_experts_per_tok": file.get("expert_used_count"),
    },
)
FAMILIES = {
    "llama": GGUFFamily("LlamaForCausalLM", paired=True),
    "qwen2": GGUFFamily("Qwen2ForCausalLM"),
    "qwen3": GGUFFamily("Qwen3ForCausalLM"),
    "gemma2": GGUFFamily(
        "Gemma2ForCausalLM", {**_AROUND, **_ATTENTION, **_MLP}, norm_offset=1.0, fields=_gemma
    ),
    "gemma3": GGUFFamily(
        "Gemma3ForCausalLM", {**_AROUND, **_ATTENTION, **_MLP}, norm_offset=1.0, fields=_gemma3
    ),
    "phi3": GGUFFamily("Phi3ForCausalLM", _PHI3, fields=_phi3),
    "olmo2": GGUFFamily("Olmo2ForCausalLM", {**_AFTER, **_ATTENTION, **_MLP}),
    "granite": GGUFFamily("GraniteForCausalLM", paired=True, fields=_granite),
    "smollm3": GGUFFamily("SmolLM3ForCausalLM", paired=True),
    "qwen2moe": GGUFFamily(
        "Qwen2MoeForCausalLM", {**_BEFORE, **_ATTENTION, **_EXPERTS, **_SHARED}, fields=_moe
    ),
    "qwen3moe": GGUFFamily("Qwen3MoeForCausalLM", {**_BEFORE, **_ATTENTION, **_EXPERTS}, fields=_moe),
}
