"""A model to prune: its weights, tokenizer, family and head; from an alias, a hub id or a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtool.errors import ModelError, UsageError
from llmtool.models.resolve import ALIASES as EMBEDDED
from llmtool.models.resolve import resolve
from llmtool.prune.cost import Shape
from llmtool.prune.modeling import LAYOUTS, Layout, base_of
from llmtool.prune.units import Sublayer, consumer_of, sublayers_of

# Names for models on the hub; those of llmtool.models.resolve come inside packages.
ALIASES = {
    "bert": "google-bert/bert-base-uncased",
    "distilbert": "distilbert/distilbert-base-uncased",
    "roberta": "FacebookAI/roberta-base",
    "vit": "google/vit-base-patch16-224",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen3": "Qwen/Qwen3-0.6B",
}
_HEADS = {
    "SequenceClassification": ("AutoModelForSequenceClassification", "classification"),
    "QuestionAnswering": ("AutoModelForQuestionAnswering", "qa"),
    "ImageClassification": ("AutoModelForImageClassification", "classification"),
    "CausalLM": ("AutoModelForCausalLM", "lm"),
}


@dataclass(slots=True)
class Loaded:
    """model: in fp32 and evaluation mode, its parameters frozen. head: classification | regression | qa | lm |
    embedding. auto: the Auto class that loads it. source: the directory it came from."""

    model: Any
    tokenizer: Any
    layout: Layout
    family: str
    head: str
    auto: str
    source: Path
    sublayers: tuple[Sublayer, ...]

    @property
    def pad_id(self) -> int:
        return int(getattr(self.tokenizer, "pad_token_id", None) or 0)

    @property
    def causal(self) -> bool:
        return self.head == "lm"

    @property
    def is_image(self) -> bool:
        return self.family == "vit"

    @property
    def label_ids(self) -> dict[str, int]:
        return {str(k): int(v) for k, v in (getattr(self.model.config, "label2id", None) or {}).items()}

    def shape(self, tokens: float) -> Shape:
        config = self.model.config
        mlp = self.sublayers[1]
        layer = consumer_of(self.model, self.layout, mlp)
        blocks = base_of(self.model).get_submodule(self.layout.layers)
        first: nn.Module = blocks[0]  # type: ignore[index]
        return Shape(
            hidden=layer.out_features,
            tokens=tokens,
            inner_matrices=len(self.layout.inner),
            qkv_bias=first.get_submodule(self.layout.query).bias is not None,
            inner_bias=first.get_submodule(self.layout.inner[0]).bias is not None,
            cached=self.causal,
            dtype_bytes=4 if str(getattr(config, "dtype", None)) == "torch.float32" else 2,
            total_params=sum(p.numel() for p in self.model.parameters()),
        )


def find(name: str) -> Path:
    """The directory of an alias, a hub id or a path. Raises ModelError with a remedy."""
    if name in ALIASES and not Path(name).exists():
        try:
            return resolve(ALIASES[name])
        except ModelError as error:
            raise ModelError(
                f"{name} is {ALIASES[name]} on the hub, which cannot be had from here: {error.message}",
                "Download it where there is a network, and give its directory (with config.json, the weights and "
                "the tokenizer) in the place of the name.",
            ) from None
    if name not in EMBEDDED and "/" not in name and not Path(name).exists():
        raise ModelError(
            f"The model {name!r} is no directory, file or alias.",
            f"Give a Hugging Face directory, a GGUF file, a hub id (owner/name) or an alias "
            f"({', '.join((*EMBEDDED, *ALIASES))}).",
        )
    return resolve(name)


def load_model(directory: Path, device: torch.device | str = "cpu") -> Loaded:
    """Raises ModelError for a family without an adapter, or weights that do not fit."""
    config = _config(directory)
    family = str(config.get("model_type"))
    if family not in LAYOUTS:
        raise ModelError(
            f"There is no adapter for the family {family!r}; there are {', '.join(LAYOUTS)}.",
            "To add one, describe where it keeps its layers, their attention, MLP and residual stream in a Layout "
            "of llmtool/prune/modeling.py, and add its model_type to LAYOUTS.",
        )
    if config.get("per_layer_config"):
        raise ModelError(
            f"{directory} is pruned already.", "Prune the model it was made from, to a smaller budget."
        )
    auto, head = _head_of(config)
    return _loaded(directory, family, auto, head, torch.device(device))


def _loaded(directory: Path, family: str, auto: str, head: str, device: torch.device) -> Loaded:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, auto).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"The model in {directory} cannot be loaded: {_first_line(error)}") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    wrong = [str(key) for key in wrong if "pooler" not in str(key) and "position_ids" not in str(key)]
    if wrong:
        raise ModelError(
            f"The weights in {directory} do not fit its config.json: missing {', '.join(wrong[:4])}."
        )
    model.eval().requires_grad_(False).to(device)
    layout = LAYOUTS[family]
    return Loaded(
        model=model,
        tokenizer=None if family == "vit" else _tokenizer(directory),
        layout=layout,
        family=family,
        head=head,
        auto=auto,
        source=directory,
        sublayers=sublayers_of(model, layout, causal=head == "lm"),
    )


def _tokenizer(directory: Path) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"The tokenizer in {directory} cannot be loaded: {_first_line(error)}",
            "Put the model's tokenizer files beside its weights.",
        ) from error
    return tokenizer


def _head_of(config: Mapping[str, Any]) -> tuple[str, str]:
    architecture = str((config.get("architectures") or ["Model"])[0])
    for ending, (auto, head) in _HEADS.items():
        if architecture.endswith(ending):
            if head == "classification" and _num_labels(config) == 1:
                return auto, "regression"
            return auto, head
    return "AutoModel", "embedding"


def _num_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else 2


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return data


def check_head(loaded: Loaded, kind: str, name: str) -> None:
    """Raises UsageError where a task asks for a head that the model has not."""
    if loaded.head != kind:
        raise UsageError(
            f"The task {name} is {kind}, and the model in {loaded.source} has a head for {loaded.head}.",
            "Give a model fine-tuned on the task, or calibrate without labels: --text FILE, or no --task at all.",
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
