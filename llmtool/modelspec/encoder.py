"""EncoderSpec: what an encoder of the BERT family is, read from its raw config.json.

Sources: the configuration and model classes of transformers 5, whose defaults stand where config.json is silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtool.errors import ModelError
from llmtool.modelspec.config import Config, read_config

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A classifier on the first token: a square layer, its activation, and one row per label.

    activation: tanh | relu. multi_label: labels are independent, a sigmoid each; so is a single one's score.
    """

    labels: tuple[str, ...]
    activation: str
    multi_label: bool = False

    @property
    def independent(self) -> bool:
        return self.multi_label or len(self.labels) == 1


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """An encoder, resolved. family: its model_type.

    position_rows: rows of the table of positions, of which the first position_offset stand for nothing.
    token_types: rows of the table of segments, 0 where there is none. relative_buckets: of MPNet's bias of
    attention by distance, 0 for the others. head: of a sequence classifier. embedding_sizes: to what length
    embeddings may be cut (Matryoshka), () for any where `matryoshka`.
    """

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    norm_eps: float
    position_rows: int
    position_offset: int = 0
    token_types: int = 0
    relative_buckets: int = 0
    head: HeadSpec | None = None
    matryoshka: bool = False
    embedding_sizes: tuple[int, ...] = ()

    @classmethod
    def from_dir(cls, path: str | Path) -> EncoderSpec:
        """The spec of a Hugging Face directory. Raises ModelError when it has no readable config.json."""
        return cls.from_config(read_config(Path(path)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EncoderSpec:
        """The spec that a parsed config.json describes. Raises ModelError for what does not run, or a field that is
        missing or makes no sense."""
        name = str(config.get("model_type"))
        if name not in FAMILIES:
            raise ModelError(
                f"The encoder family {name} does not run here.", f"These do: {', '.join(sorted(FAMILIES))}."
            )
        return _read(Config(config, FAMILIES[name].defaults), name, FAMILIES[name])

    @staticmethod
    def is_encoder(path: str | Path) -> bool:
        """Whether a Hugging Face directory holds an encoder that runs here. Raises ModelError as from_dir."""
        config = read_config(Path(path))
        return config.get("model_type") in FAMILIES and not config.get("is_decoder")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence."""
        return self.position_rows - self.position_offset

    @property
    def num_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices().values())

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Parameters by kind as (number of vectors, their length), all layers together."""
        h, inner, layers = self.hidden_size, self.intermediate_size, self.num_layers
        labels = 0 if self.head is None else len(self.head.labels)
        return {
            "embeddings": (self.vocab_size + self.position_rows + self.token_types, h),
            "attention": (4 * h * layers, h),
            "attention_bias": (4 * layers, h),
            "mlp": (2 * inner * layers, h),
            "mlp_bias": (layers, inner + h),
            "norms": (2 + 4 * layers, h),
            "relative_bias": (self.relative_buckets, self.num_heads),
            "head": (0 if self.head is None else h + 1 + labels, h),
            "head_bias": (labels, 1),
        }


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """How a family differs from BERT. names: its fields by BERT's. offset: positions start after the padding's id.

    head: the activation of its classifier.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    offset: bool = False
    token_types: bool = True
    relative: bool = False
    head: str = "tanh"


_BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_ROBERTA = EncoderFamily({**_BERT, "vocab_size": 50265, "pad_token_id": 1}, offset=True)
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily(_BERT),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": EncoderFamily(
        {**{_DISTILBERT_NAMES.get(k, k): v for k, v in _BERT.items()}, "n_layers": 6},
        _DISTILBERT_NAMES,
        token_types=False,
        head="relu",
    ),
    "mpnet": EncoderFamily(
        {**_BERT, "vocab_size": 30527, "pad_token_id": 1, "relative_attention_num_buckets": 32},
        offset=True,
        token_types=False,
        relative=True,
    ),
}


def _read(config: Config, name: str, family: EncoderFamily) -> EncoderSpec:
    def count(key: str) -> int:
        return config.count(family.names.get(key, key))

    if config.flag("is_decoder") or config.flag("add_cross_attention"):
        raise ModelError(f"This {name} model is set up as a decoder, which does not run here.")
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ModelError(f"Position embeddings of the type {kind!r} do not run here.")
    heads, hidden = count("num_attention_heads"), count("hidden_size")
    if hidden % heads:
        raise ModelError(f"The hidden size ({hidden}) is not a multiple of the attention heads ({heads}).")
    activation = config.get(family.names.get("hidden_act", "hidden_act"))
    if activation not in ACTIVATIONS:
        raise ModelError(f"The activation {activation!r} does not run here.")
    architecture = str((config.get("architectures") or [f"{name} model"])[0])
    sizes = config.get("matryoshka_dimensions") or ()
    return EncoderSpec(
        architecture=architecture,
        family=name,
        vocab_size=count("vocab_size"),
        hidden_size=hidden,
        num_layers=count("num_hidden_layers"),
        num_heads=heads,
        intermediate_size=count("intermediate_size"),
        activation=ACTIVATIONS[activation],
        # DistilBERT writes no epsilon, it is fixed.
        norm_eps=config.number("layer_norm_eps", 1e-12),
        position_rows=count("max_position_embeddings"),
        # MPNet's padding is 1, whatever its configuration says.
        position_offset=(2 if family.relative else _pad_id(config) + 1) if family.offset else 0,
        token_types=count("type_vocab_size") if family.token_types else 0,
        relative_buckets=count("relative_attention_num_buckets") if family.relative else 0,
        head=_head(config, architecture, family),
        matryoshka=bool(sizes) or config.flag("is_matryoshka"),
        embedding_sizes=tuple(int(size) for size in sizes),
    )


def _pad_id(config: Config) -> int:
    value = config.get("pad_token_id")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(f"config.json: pad_token_id must be a token id, and is {value!r}.")
    return value


def _head(config: Config, architecture: str, family: EncoderFamily) -> HeadSpec | None:
    if not architecture.endswith("ForSequenceClassification"):
        return None
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        try:
            labels = tuple(str(names[key]) for key in sorted(names, key=int))
        except ValueError:
            raise ModelError("config.json: id2label must map numbers to labels.") from None
    else:  # transformers writes the table only where it is not this one
        count = config.count("num_labels", 2)
        labels = tuple(f"LABEL_{i}" for i in range(count))
    return HeadSpec(labels, family.head, config.get("problem_type") == "multi_label_classification")
