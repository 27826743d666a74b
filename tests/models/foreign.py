"""Tiny random models that have no native family here, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
# model_type -> settings: learned positions, parallel blocks, interleaved rotary, windows, experts, scaled logits
RUNS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 48, "ffn_dim": 80},
    "gemma": {"head_dim": 16},
    "starcoder2": {"sliding_window": 7},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 7, "layer_types": SLIDING},
    "olmo3": {"sliding_window": 7, "layer_types": SLIDING},
    "glm4": {"head_dim": 8},
    "granitemoe": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
        "logits_scaling": 3.0,
    },
    "olmoe": EXPERTS,
    "exaone4": {"sliding_window": 7, "layer_types": SLIDING},
    "vaultgemma": {"head_dim": 8, "sliding_window": 7, "layer_types": SLIDING, "attn_logit_softcapping": 2.0},
}


def save(directory: Path, kind: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    fields = {**SIZES, **settings}
    if kind in ("gpt2", "bloom", "mpt", "mamba"):
        fields.pop("num_key_value_heads")
    config = transformers.CONFIG_MAPPING[kind](**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.save_pretrained(directory)
    return model
