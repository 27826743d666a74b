"""Tiny models written as llama.cpp's convert_hf_to_gguf.py writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from llmtool.models.tokenizer import BYTE_OF_CHAR

Quantise = gguf.GGMLQuantizationType
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Which of a configuration's fields become which keys, where a family has them.
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
PAIRED = ("llama", "granite", "smollm3")
CONTROL = ["<|end|>", "<|start|>"]
TOKENS = [*CONTROL, *BYTE_OF_CHAR, "Ġt", "he", "Ġthe", "ĊĊ", "<tool>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ċ Ċ"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁these"]
PIECES = [*dict.fromkeys(PIECES), "th", "the", "▁the"]
TYPES = [3, 3, *[1] * 256, 1, 1, 1, 1, 4]


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    arch: str,
    extra: dict[str, Any] | None = None,
    pre: str = "smollm",
    quantise: Quantise | None = None,
) -> Path:
    """pre: the pre-tokenizer's name, or "sentencepiece". quantise: the type of matrices, F32 without."""
    writer = gguf.GGUFWriter(path, arch)
    _write_config(writer, model.config, arch)
    _write_tokenizer(writer, pre)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    for name, weight in tensors(model, arch).items():
        if quantise is not None and weight.ndim == 2:
            packed = gguf.quants.quantize(weight, quantise)
            writer.add_tensor(name, packed, raw_dtype=quantise)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model: transformers.PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    config, found = model.config, {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch in PAIRED and "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        if arch in PAIRED and "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            weight = weight + 1
        if name.endswith("shared_expert_gate.weight"):
            weight = weight[0]
        found |= {key: part.contiguous().numpy() for key, part in _named(name, weight, arch)}
    return found | _rope_tensors(model)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's LlamaModel.permute: row r of the second half of a head comes after row r of the first."""
    order = [
        head * (len(weight) // heads) + half * (len(weight) // heads // 2) + pair
        for head in range(heads)
        for pair in range(len(weight) // heads // 2)
        for half in range(2)
    ]
    return weight[order]


def _named(name: str, weight: torch.Tensor, arch: str) -> list[tuple[str, torch.Tensor]]:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return [(f"{TOP[stem]}.{kind}", weight)]
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if part == "mlp.experts":  # all experts stacked
        if kind == "down_proj":
            return [(f"blk.{layer}.ffn_down_exps.weight", weight)]
        gate, up = weight.chunk(2, dim=1)
        return [(f"blk.{layer}.ffn_gate_exps.weight", gate), (f"blk.{layer}.ffn_up_exps.weight", up)]
    names = {**LAYER, **(AROUND if arch in ("gemma2", "gemma3", "olmo2") else {})}
    return [(f"blk.{layer}.{names[part]}.{kind}", weight)]


def _rope_tensors(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "llama3":
        inv_freq = model.model.rotary_emb.inv_freq
        plain = rope["rope_theta"] ** -(torch.arange(0, 2 * len(inv_freq), 2) / (2 * len(inv_freq)))
        return {"rope_freqs.weight": (plain / inv_freq).numpy()}
    if rope.get("rope_type") == "longrope":
        kinds = ("short", "long")
        return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in kinds}
    return {}


def _write_config(writer: gguf.GGUFWriter, config: transformers.PreTrainedConfig, arch: str) -> None:
    fields = config.to_dict()
    for name, key in KEYS.items():
        if fields.get(name) is not None and not isinstance(fields[name], list):
            _add(writer, f"{arch}.{key}", fields[name])
    rope = fields["rope_parameters"]
    if arch == "gemma3":
        rope = rope["full_attention"]
    head_dim = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    _add(writer, f"{arch}.attention.key_length", head_dim)
    _add(writer, f"{arch}.rope.freq_base", float(rope["rope_theta"]))
    _add(writer, f"{arch}.rope.dimension_count", int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        _add(writer, f"{arch}.rope.scaling.type", rope["rope_type"])
        _add(writer, f"{arch}.rope.scaling.factor", float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        _add(writer, f"{arch}.rope.scaling.original_context_length", rope["original_max_position_embeddings"])


def _write_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    if pre == "sentencepiece":
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259)])
        writer.add_token_scores([-float(i) for i in range(len(PIECES))])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types(TYPES)
        writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0 if pre != "sentencepiece" else 2)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")


def _add(writer: gguf.GGUFWriter, key: str, value: str | float | bool | int) -> None:
    add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
    if key in writer.kv_data[0]:
        del writer.kv_data[0][key]  # what a test adds overrules
    add[type(value)](key, value)
