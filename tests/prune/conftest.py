"""Tiny random models of every family with an adapter, and calibration items for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from llmtool.prune.batches import Item
from llmtool.prune.model import Loaded, load_model

VOCAB = 97
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0}
ENCODER: dict[str, Any] = {
    **SIZES, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "intermediate_size": 80,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
DECODER: dict[str, Any] = {
    **SIZES, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "intermediate_size": 80, "max_position_embeddings": 64, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER),
    "distilbert": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {**SIZES, "dim": 48, "n_heads": 6, "n_layers": 3, "hidden_dim": 80, "max_position_embeddings": 64,
         "dropout": 0.0, "attention_dropout": 0.0, "num_labels": 3},
    ),
    "bert-qa": ("BertConfig", "BertForQuestionAnswering", {**ENCODER, "num_labels": 2}),
    "bert-body": ("BertConfig", "BertModel", ENCODER),
    "vit": (
        "ViTConfig", "ViTForImageClassification",
        {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "intermediate_size": 80,
         "image_size": 32, "patch_size": 8, "num_labels": 3},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER),
}  # fmt: skip
Tiny = Callable[..., Loaded]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    yield
    torch.set_num_threads(threads)


def build(name: str, directory: Path, **changes: Any) -> None:
    """Save a tiny model, every parameter random, with a tokenizer."""
    config_class, model_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    torch.manual_seed(len(name))
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.save_pretrained(directory)
    if name != "vit":
        words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3} | {f"w{i}": i for i in range(4, VOCAB)}
        backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        backend.pre_tokenizer = Whitespace()
        names = ["input_ids", "attention_mask"]
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
        ).save_pretrained(directory)


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a tiny model -> the directory it was saved to; built once."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = tmp_path_factory.mktemp(name)
            build(name, built[name])
        return built[name]

    return get


@pytest.fixture
def tiny(directory_of: Callable[[str], Path]) -> Tiny:
    """name -> the model, loaded anew."""
    return lambda name: load_model(directory_of(name))


def items_of(loaded: Loaded, count: int = 48, seed: int = 0, labels: bool = True) -> list[Item]:
    """Random items of different lengths with random labels."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    if loaded.is_image:
        return [
            Item(
                {"pixel_values": torch.randn(3, 32, 32, generator=generator)},
                integer(0, 3) if labels else None,
            )
            for _ in range(count)
        ]
    items = []
    for _ in range(count):
        length = 16 if loaded.causal else integer(5, 14)
        ids = torch.randint(4, VOCAB, (length,), generator=generator).tolist()
        label: Any = (integer(0, length), integer(0, length)) if loaded.head == "qa" else integer(0, 3)
        plain = loaded.causal or loaded.head == "embedding" or not labels
        items.append(Item({"input_ids": ids, "attention_mask": [1] * length}, None if plain else label))
    return items
