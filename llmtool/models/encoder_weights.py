"""An encoder's weights in memory, and which tensors of a Hugging Face checkpoint fill them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from llmtool.models.checkpoint import Slot
from llmtool.models.loader import Progress, fill_slots
from llmtool.modelspec import EncoderSpec


@dataclass(slots=True)
class Affine:
    """A layer weight [out, in] and bias [out]; of a norm both are [hidden]."""

    weight: Tensor
    bias: Tensor


@dataclass(slots=True)
class EncoderLayerWeights:
    """Rows of qkv: q, k, v heads. Norms follow the residual sum, as BERT has it."""

    qkv: Affine
    o: Affine
    attention_norm: Affine
    up: Affine
    down: Affine
    mlp_norm: Affine


@dataclass(slots=True)
class EncoderWeights:
    """dense, out: of a classifier. relative_bias: MPNet's [buckets, heads]."""

    embedding: Tensor  # [vocab, hidden]
    positions: Tensor  # [rows, hidden]
    norm: Affine
    layers: list[EncoderLayerWeights]
    token_types: Tensor | None = None  # [types, hidden]
    relative_bias: Tensor | None = None
    dense: Affine | None = None
    out: Affine | None = None


@dataclass(frozen=True, slots=True)
class _Names:
    """How a family calls its parts. head: the square layer and the rows of labels."""

    layer: str = "encoder.layer"
    q: str = "attention.self.query"
    k: str = "attention.self.key"
    v: str = "attention.self.value"
    o: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    head: tuple[str, str] = ("classifier.dense", "classifier.out_proj")


_ROBERTA = _Names()
_NAMES = {
    "bert": _Names(head=("pooler.dense", "classifier")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _Names(
        layer="transformer.layer",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        mlp_norm="output_layer_norm",
        head=("pre_classifier", "classifier"),
    ),
    "mpnet": _Names(
        q="attention.attn.q",
        k="attention.attn.k",
        v="attention.attn.v",
        o="attention.attn.o",
        attention_norm="attention.LayerNorm",
    ),
}
_PREFIX = re.compile(r"^(bert|roberta|distilbert|mpnet)\.")
# Heads of other tasks, and a buffer that old exporters saved.
_IGNORED = re.compile(
    r"(cls|lm_head|pooler|classifier|pre_classifier|qa_outputs|predictions|vocab_\w+)\..*|embeddings\.position_ids"
)


def load_weights(
    spec: EncoderSpec,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    load_format: str = "auto",
    seed: int = 0,
) -> EncoderWeights:
    """The encoder's weights cast to dtype on device; random ones of `seed` where load_format is dummy.

    Raises ModelError naming every tensor that is missing, unexpected or of the wrong shape.
    """
    weights = allocate(spec, dtype, device)
    if load_format == "dummy":
        generator = torch.Generator(device).manual_seed(seed)
        for tensor in tensors(weights):
            tensor.normal_(float(tensor.dim() == 1), 0.02, generator=generator)
    else:
        nothing: Progress = lambda done, total: None  # noqa: E731
        fill_slots(
            slots(spec, weights),
            directory,
            progress or nothing,
            canonical_name,
            lambda name: bool(_IGNORED.fullmatch(name)),
        )
    return weights


def canonical_name(name: str) -> str:
    """Without the model's prefix, and with today's names of a norm's parts."""
    name = _PREFIX.sub("", name)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def allocate(spec: EncoderSpec, dtype: torch.dtype, device: torch.device) -> EncoderWeights:
    """Weights of the spec's shapes, not filled yet."""
    hidden, inner, head = spec.hidden_size, spec.intermediate_size, spec.head

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def affine(rows: int, columns: int) -> Affine:
        return Affine(new(rows, columns), new(rows))

    def norm() -> Affine:
        return Affine(new(hidden), new(hidden))

    return EncoderWeights(
        embedding=new(spec.vocab_size, hidden),
        positions=new(spec.position_rows, hidden),
        norm=norm(),
        layers=[
            EncoderLayerWeights(
                affine(3 * hidden, hidden),
                affine(hidden, hidden),
                norm(),
                affine(inner, hidden),
                affine(hidden, inner),
                norm(),
            )
            for _ in range(spec.num_layers)
        ],
        token_types=new(spec.token_types, hidden) if spec.token_types else None,
        relative_bias=new(spec.relative_buckets, spec.num_heads) if spec.relative_buckets else None,
        dense=affine(hidden, hidden) if head else None,
        out=affine(len(head.labels), hidden) if head else None,
    )


def slots(spec: EncoderSpec, weights: EncoderWeights) -> dict[str, Slot]:
    """Hugging Face's tensor names -> what they fill. Every byte of the weights is in exactly one slot."""
    names = _NAMES[spec.family]
    table: dict[str, Tensor | None] = {
        "embeddings.word_embeddings.weight": weights.embedding,
        "embeddings.position_embeddings.weight": weights.positions,
        "embeddings.token_type_embeddings.weight": weights.token_types,
        "encoder.relative_attention_bias.weight": weights.relative_bias,
    }
    parts: dict[str, Affine | None] = {"embeddings.LayerNorm": weights.norm}
    parts |= dict(zip(names.head, (weights.dense, weights.out), strict=True))
    for i, layer in enumerate(weights.layers):
        parts |= {f"{names.layer}.{i}.{name}": part for name, part in _layer(names, layer).items()}
    for name, part in parts.items():
        if part is not None:
            table |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    return {name: Slot(tensor) for name, tensor in table.items() if tensor is not None}


def _layer(names: _Names, w: EncoderLayerWeights) -> Mapping[str, Affine]:
    qkv = zip(w.qkv.weight.chunk(3), w.qkv.bias.chunk(3), strict=True)
    q, k, v = (Affine(weight, bias) for weight, bias in qkv)
    return {names.q: q, names.k: k, names.v: v, names.o: w.o, names.attention_norm: w.attention_norm} | {
        names.up: w.up,
        names.down: w.down,
        names.mlp_norm: w.mlp_norm,
    }


def tensors(part: object) -> Iterator[Tensor]:
    """Every tensor of the weights, in a fixed order."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from tensors(item)
    elif part is not None:
        for field in fields(part):  # type: ignore[arg-type]
            yield from tensors(getattr(part, field.name))
