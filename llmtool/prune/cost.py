"""What units cost: multiply-accumulates, parameters, KV bytes, and seconds measured on this device.

MACs as section 3.2 of arXiv 2204.09656 counts them: a head of dimension d over S tokens of width D is
3 S D d (q, k, v) + 2 S^2 d (scores and their sum) + S d D (output), a neuron 2 S D; embeddings, norms and the
classifier are not counted. Grouped heads split this: q and output go with the query head, k and v with the KV head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtool.prune.units import Kept, Sublayer, kv_heads_of

KINDS = ("flops", "params", "kv", "latency")


@dataclass(frozen=True, slots=True)
class Shape:
    """hidden: D. tokens: S, at which MACs are counted. inner_matrices: that feed a neuron (2 where it is gated).
    qkv_bias, inner_bias: whether these have a bias. cached: whether keys and values are kept (a decoder).
    dtype_bytes: of a cached element. total_params: of the whole model."""

    hidden: int
    tokens: float
    inner_matrices: int = 1
    qkv_bias: bool = False
    inner_bias: bool = False
    cached: bool = False
    dtype_bytes: int = 2
    total_params: int = 0


def size(sublayer: Sublayer, units: Sequence[int]) -> tuple[int, int]:
    """(query heads, KV heads) or (neurons, 0)."""
    if sublayer.kind == "mlp":
        return len(units), 0
    return len(units), len(kv_heads_of(sublayer, units))


def macs(shape: Shape, sublayer: Sublayer, count: int, kv_heads: int) -> float:
    """Multiply-accumulates of one sequence of shape.tokens tokens."""
    tokens, hidden = shape.tokens, shape.hidden
    if sublayer.kind == "mlp":
        return count * (shape.inner_matrices + 1) * tokens * hidden
    dim = sublayer.unit_dim
    per_query = 2 * tokens * hidden * dim + 2 * tokens * tokens * dim
    return count * per_query + kv_heads * 2 * tokens * hidden * dim


def params(shape: Shape, sublayer: Sublayer, count: int, kv_heads: int) -> int:
    """Parameters that go when these units go; a bias after the sublayer stays."""
    if sublayer.kind == "mlp":
        return count * ((shape.inner_matrices + 1) * shape.hidden + shape.inner_matrices * shape.inner_bias)
    rows = (count + 2 * kv_heads) * sublayer.unit_dim
    return rows * (shape.hidden + shape.qkv_bias) + count * sublayer.unit_dim * shape.hidden


def kv_bytes(shape: Shape, sublayer: Sublayer, kv_heads: int) -> int:
    """Bytes that one token keeps in this layer."""
    return 2 * kv_heads * sublayer.unit_dim * shape.dtype_bytes if shape.cached else 0


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Seconds of one layer's attention by query heads and of its MLP by neurons, measured at a few sizes and
    linear between them; fixed: seconds of all that is not pruned."""

    attention: Mapping[int, float]
    mlp: Mapping[int, float]
    fixed: float = 0.0
    batch: int = 1
    tokens: int = 0

    def seconds(self, kind: str, count: int) -> float:
        table = self.attention if kind == "attention" else self.mlp
        if count in table:
            return table[count]
        sizes = sorted(table)
        upper = next((s for s in sizes if s > count), sizes[-1])
        lower = max((s for s in sizes if s < count), default=sizes[0])
        if upper == lower:
            return table[upper]
        share = (count - lower) / (upper - lower)
        return table[lower] + share * (table[upper] - table[lower])


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs of a sublayer's size, by kind. latency: None where it was not measured."""

    shape: Shape
    latency: LatencyTable | None = None

    def of(self, kind: str, sublayer: Sublayer, count: int, kv_heads: int) -> float:
        if kind == "flops":
            return macs(self.shape, sublayer, count, kv_heads)
        if kind == "params":
            return params(self.shape, sublayer, count, kv_heads)
        if kind == "kv":
            return kv_bytes(self.shape, sublayer, kv_heads)
        assert kind == "latency" and self.latency is not None
        return self.latency.seconds(sublayer.kind, count)

    def total(self, kind: str, sublayers: Sequence[Sublayer], kept: Kept) -> float:
        """Of all sublayers; latency with what is not pruned."""
        fixed = self.latency.fixed if kind == "latency" and self.latency else 0.0
        return fixed + sum(self.of(kind, s, *size(s, u)) for s, u in zip(sublayers, kept, strict=True))

    def dense(self, kind: str, sublayers: Sequence[Sublayer]) -> float:
        return self.total(kind, sublayers, tuple(tuple(range(s.num_units)) for s in sublayers))
