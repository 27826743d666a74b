"""Whole decoders through the kernels against the same decoders through torch: that each is called as it means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmtool_kernels import dispatch

from llmtool.models.decoder import NativeDecoder
from llmtool.models.weights import DecoderWeights, allocate, fill_random, named_tensors
from llmtool.modelspec import ModelSpec
from tests.models.paged import PagedSequences

BASE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},  # a norm per head
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
    },  # over all heads, and after blocks
    "gemma2": {  # before and after, windows, soft caps
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_says_the_same_through_kernels(
    device: torch.device, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec.from_config({**BASE, **FAMILIES[family]})
    weights = allocate(spec, torch.float32, torch.device("cpu"))
    fill_random(weights, 0)
    model = NativeDecoder(spec, weights)
    steps = ({"a": range(9), "b": [3]}, {"a": [7], "b": [4, 5, 6]})
    said = []
    for kernels in (False, True):
        monkeypatch.setattr(dispatch, "on_gpu", lambda _, kernels=kernels: kernels)
        if kernels and device.type == "cuda":
            weights = allocate(spec, torch.float32, device)
            copy_weights(model, weights)
            model = NativeDecoder(spec, weights)
        sequences = PagedSequences(model)
        said.append([logits.cpu() for step in steps for logits in sequences.step(step)])
    torch.testing.assert_close(said[0], said[1], atol=1e-4, rtol=1e-4)


def copy_weights(model: NativeDecoder, weights: DecoderWeights) -> None:
    for (_, source), (_, target) in zip(named_tensors(model.weights), named_tensors(weights), strict=True):
        target.copy_(source)
