"""A pruned decoder as a GGUF file that llama.cpp runs.

Sizes that differ between layers need llama.cpp's `deci` architecture, which has query heads, KV heads and widths
per layer, none of them included. It turns neighbouring rows of a head, so rows of q and k are put that way;
families whose rotary embedding turns halves (Qwen2) are served by the same change of rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from llmtool.errors import ModelError
from llmtool.prune.model import Loaded
from llmtool.prune.modeling import base_of, head_dim, layers_of

FAMILIES = ("llama", "mistral", "qwen2")
_PLAIN = "default"
# How llama.cpp calls a pre-tokenizer, by what is special in tokenizer.json's.
_PRE = (("Digits", "smollm"), ("\\p{N}{1,3}", "llama-bpe"), ("\\p{N}", "qwen2"), ("ByteLevel", "gpt-2"))


def write(loaded: Loaded, small: Any, sizes: list[tuple[int, int, int]], path: Path) -> None:
    """Write `small` in fp16, norms in fp32. Raises ModelError for what llama.cpp's `deci` cannot hold."""
    _check(loaded)
    config = loaded.model.config
    writer = gguf.GGUFWriter(path, "deci")
    writer.add_name(loaded.source.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(sizes))
    writer.add_feed_forward_length([width for _, _, width in sizes])
    writer.add_head_count([heads for heads, _, _ in sizes])
    writer.add_head_count_kv([kv_heads for _, kv_heads, _ in sizes])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    dim = loaded.sublayers[0].unit_dim
    writer.add_rope_dimension_count(dim)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _tokenizer(writer, loaded)
    for name, tensor in _tensors(loaded, small, sizes):
        keep = tensor.dim() == 1  # norms and biases
        array = tensor.detach().float().cpu().numpy()
        writer.add_tensor(name, array if keep else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(loaded: Loaded) -> None:
    config = loaded.model.config
    if loaded.family not in FAMILIES or not loaded.causal:
        raise ModelError(
            f"llama.cpp has no architecture for a pruned {loaded.family}.",
            f"GGUF can be written for {', '.join(FAMILIES)}; use --export hf or onnx.",
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ModelError("llama.cpp's deci architecture has no sliding windows.", "Use --export hf.")
    if _rope(config).get("rope_type", _PLAIN) != _PLAIN:
        raise ModelError(
            f"A rotary embedding of kind {_rope(config)['rope_type']} is not written to GGUF.",
            "Use --export hf.",
        )


def _rope(config: Any) -> dict[str, Any]:
    table = getattr(config, "rope_parameters", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **table}


def _tensors(loaded: Loaded, small: Any, sizes: list[tuple[int, int, int]]) -> list[tuple[str, Tensor]]:
    base: Any = base_of(small)
    found: list[tuple[str, Tensor]] = [
        ("token_embd.weight", base.embed_tokens.weight),
        ("output_norm.weight", base.norm.weight),
    ]
    if not loaded.model.config.tie_word_embeddings:
        found.append(("output.weight", small.lm_head.weight))
    for i, (layer, (heads, kv_heads, width)) in enumerate(
        zip(layers_of(small, loaded.layout), sizes, strict=True)
    ):
        block: Any = layer
        prefix = f"blk.{i}."
        if heads:
            attention = block.self_attn
            dim = head_dim(layer, loaded.layout)
            found.append((f"{prefix}attn_norm.weight", block.input_layernorm.weight))
            for name, module, paired in (
                ("attn_q", attention.q_proj, heads),
                ("attn_k", attention.k_proj, kv_heads),
                ("attn_v", attention.v_proj, 0),
                ("attn_output", attention.o_proj, 0),
            ):
                for kind in ("weight", "bias"):
                    tensor = getattr(module, kind)
                    if tensor is not None:
                        value = paired_rows(tensor, paired, dim) if paired else tensor
                        found.append((f"{prefix}{name}.{kind}", value))
        if width:
            found.append((f"{prefix}ffn_norm.weight", block.post_attention_layernorm.weight))
            for name, module in (
                ("gate", block.mlp.gate_proj),
                ("up", block.mlp.up_proj),
                ("down", block.mlp.down_proj),
            ):
                found.append((f"{prefix}ffn_{name}.weight", module.weight))
                if module.bias is not None:
                    found.append((f"{prefix}ffn_{name}.bias", module.bias))
    return found


def paired_rows(rows: Tensor, heads: int, dim: int) -> Tensor:
    """Rows of each head from halves (0, d/2), (1, d/2 + 1), ... to neighbours, as llama.cpp's rotary wants them."""
    return rows.unflatten(0, (heads, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


def _tokenizer(writer: gguf.GGUFWriter, loaded: Loaded) -> None:
    """The byte-level BPE of tokenizer.json. Raises ModelError for another kind."""
    data = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(data.get("pre_tokenizer")):
        raise ModelError("Only byte-level BPE tokenizers are written to GGUF.", "Use --export hf.")
    size = int(loaded.model.config.vocab_size)
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, int(gguf.TokenType.NORMAL)
    for added in data.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        special = added.get("special", False)
        kinds[added["id"]] = int(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    described = json.dumps(data.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\")
    pre = next(name for mark, name in _PRE if mark in described)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    config = loaded.model.config
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        value = getattr(config, name, None)
        if isinstance(value, list):
            value = value[0]
        if isinstance(value, int) and 0 <= value < size:
            add(value)
    writer.add_add_bos_token(False)
    if getattr(loaded.tokenizer, "chat_template", None):
        writer.add_chat_template(loaded.tokenizer.chat_template)
