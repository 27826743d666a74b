"""A decoder's weights in memory: matrices [out, in], fused where one input feeds several of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmtool.modelspec import (
    AttentionSpec,
    DenseSpec,
    LatentSpec,
    LayerSpec,
    MixerSpec,
    ModelSpec,
    MoESpec,
    ShortConvSpec,
)
from llmtool.parallel.shard import Shard


class BoundMatrix(Protocol):
    """A matrix, and the bias that goes with it, in a form of its own: in panels, or in fewer bits."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out], or [N, out / 2] if it also joins gates and ups."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [N, in]: rows ids [N] of the matrix."""
        ...


Matrix = Tensor | BoundMatrix  # loaded as a tensor, then bound or not (llmtool/models/bind.py)


def as_tensor(matrix: Matrix) -> Tensor:
    """A matrix that has not been bound."""
    assert isinstance(matrix, Tensor)
    return matrix


@dataclass(slots=True)
class AttentionWeights:
    """Rows of qkv: q, k, v heads."""

    qkv: Matrix  # [(Hq + 2 Hkv) * D, hidden]
    o: Matrix  # [hidden, Hq * D]
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None  # [D], or [Hq * D] of a norm over all heads
    k_norm: Tensor | None = None  # [D], or [Hkv * D]
    sinks: Tensor | None = None  # [Hq]


@dataclass(slots=True)
class LatentAttentionWeights:
    """DeepSeek's names in brackets. Rotary rows of q and kv_down: pairs half the rotary dimensions apart."""

    q: Matrix  # [Hq * (nope + rope), q_rank or hidden]  (q_b_proj or q_proj)
    kv_down: Matrix  # [kv_rank + rope, hidden]  (kv_a_proj_with_mqa)
    kv_norm: Tensor  # [kv_rank]
    kv_up: Tensor  # [Hq, nope + v, kv_rank]  (kv_b_proj)
    o: Matrix  # [hidden, Hq * v]
    q_down: Matrix | None = None  # [q_rank, hidden]  (q_a_proj)
    q_norm: Tensor | None = None  # [q_rank]
    q_down_bias: Tensor | None = None
    kv_down_bias: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(slots=True)
class ShortConvWeights:
    """Rows of into: B, C, x (LFM2)."""

    into: Matrix  # [3 * hidden, hidden]
    out: Matrix  # [hidden, hidden]
    conv: Tensor  # [hidden, kernel]
    into_bias: Tensor | None = None
    out_bias: Tensor | None = None
    conv_bias: Tensor | None = None


@dataclass(slots=True)
class Mamba2Weights:
    """Rows of into: z, x, B, C, time step. steps (dt_bias), decay (A_log) and skip (D) are float32: they decide how
    long a state lasts."""

    into: Matrix  # [sum(parts), hidden]
    out: Matrix  # [hidden, inner]
    conv: Tensor  # [channels, kernel]
    steps: Tensor  # [heads]
    decay: Tensor  # [heads]
    skip: Tensor  # [heads]
    into_bias: Tensor | None = None
    out_bias: Tensor | None = None
    conv_bias: Tensor | None = None
    norm: Tensor | None = None  # [inner]


MixerWeights = ShortConvWeights | Mamba2Weights


@dataclass(slots=True)
class DenseWeights:
    """Rows of gate_up: gates, then ups."""

    gate_up: Matrix  # [2 * inner, hidden]
    down: Matrix  # [hidden, inner]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(slots=True)
class ExpertWeights:
    """router and correction are float32: a rounded score may choose another expert. E: the experts that are here;
    the router and its vectors are of all."""

    router: Tensor  # [experts in all, hidden]
    gate_up: list[Matrix]  # E of [2 * inner, hidden], each in memory of its own, which goes when it is bound
    down: list[Matrix]  # E of [hidden, inner]
    router_bias: Tensor | None = None  # [experts in all]
    correction: Tensor | None = None  # [experts in all]
    gate_up_bias: Tensor | None = None  # [E, 2 * inner]
    down_bias: Tensor | None = None  # [E, hidden]
    shared: DenseWeights | None = None
    shared_gate: Tensor | None = None  # [1, hidden]


@dataclass(slots=True)
class LayerWeights:
    """Norms [hidden]: of what attention and MLP read, and of what they return; None where a family has none."""

    attention: AttentionWeights | LatentAttentionWeights
    mlp: DenseWeights | ExpertWeights
    attention_norm: Tensor | None = None
    attention_out_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    mixer: MixerWeights | None = None


@dataclass(slots=True)
class DecoderWeights:
    dtype: torch.dtype  # of activations, and of the matrices as they were loaded
    embedding: Matrix  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
    lm_head: Matrix  # [vocab, hidden]; the embedding itself when tied
    kv_scales: dict[int, tuple[float, float]] = field(default_factory=dict)  # Decoder's

    @property
    def nbytes(self) -> int:
        """Bytes in memory; what is tied counts once."""
        return sum({id(matrix): matrix.nbytes for _, matrix in named_matrices(self)}.values())


def named_tensors(weights: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors under an unbound weights dataclass; a tied lm_head comes a second time."""
    for name, matrix in named_matrices(weights, prefix):
        yield name, as_tensor(matrix)


def named_matrices(weights: object, prefix: str = "") -> Iterator[tuple[str, Matrix]]:
    """The same where some may be bound. Vectors count as matrices here."""
    for part in fields(weights):  # type: ignore[arg-type]
        value = getattr(weights, part.name)
        items = enumerate(value) if isinstance(value, list) else [("", value)]
        for i, item in items:
            name = f"{prefix}{part.name}" if i == "" else f"{prefix}{part.name}.{i}"
            if isinstance(item, Tensor) or (callable(item) and hasattr(item, "nbytes")):
                yield name, item
            elif is_dataclass(item):
                yield from named_matrices(item, f"{name}.")


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Uninitialised weights of the right shapes."""
    new = _Allocator(dtype, device)
    layers = [_layer(new, spec, layer) for layer in spec.layers]
    embedding = new(spec.vocab_size, spec.hidden_size)
    lm_head = embedding if spec.tied_embeddings else new(spec.vocab_size, spec.hidden_size)
    return DecoderWeights(dtype, embedding, layers, new.norm(spec.hidden_size, spec), lm_head)


def allocate_shard(shard: Shard, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """The same of what a rank holds. An embedding or head that is not needed there has no rows."""
    new, spec = _Allocator(dtype, device), shard.spec
    layers = [_layer(new, spec, layer) for layer in spec.layers]
    embedding = new(len(shard.embedding), spec.hidden_size)
    lm_head = embedding if spec.tied_embeddings else new(len(shard.head), spec.hidden_size)
    return DecoderWeights(dtype, embedding, layers, new.norm(spec.hidden_size, spec), lm_head)


@torch.no_grad()
def fill_random(weights: DecoderWeights, seed: int) -> None:
    """Random weights of a trained model's scale, the same for a seed on every run of one device."""
    generator = torch.Generator(weights.norm.device).manual_seed(seed)
    for name, tensor in named_tensors(weights):
        kind = name.rpartition(".")[2]
        if kind.endswith("norm"):
            tensor.fill_(1.0)
        elif tensor.dim() == 1 or kind.endswith("bias") or kind == "embedding":
            tensor.normal_(0.0, 0.02, generator=generator)
        elif kind == "lm_head":
            if tensor is not weights.embedding:
                tensor.normal_(0.0, 0.02, generator=generator)
        elif tensor.numel():  # a pruned layer may have no heads or neurons
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


@dataclass(frozen=True, slots=True)
class _Allocator:
    dtype: torch.dtype
    device: torch.device

    def __call__(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def norm(self, size: int, spec: ModelSpec) -> Tensor:
        # 1 + w in bfloat16 would lose most of w.
        return self.float(size) if spec.norms.offset else self(size)


def _layer(new: _Allocator, spec: ModelSpec, layer: LayerSpec) -> LayerWeights:
    def norm(present: bool) -> Tensor | None:
        return new.norm(spec.hidden_size, spec) if present else None

    a, norms = spec.attention_of(layer), spec.norms
    return LayerWeights(
        attention=_latent(new, spec, a, a.latent) if a.latent else _attention(new, spec, a),
        mlp=(
            _dense(new, layer.mlp, spec.hidden_size)
            if isinstance(layer.mlp, DenseSpec)
            else _experts(new, layer.mlp, spec.hidden_size)
        ),
        attention_norm=norm(norms.before),
        attention_out_norm=norm(norms.after),
        mlp_norm=norm(norms.before),
        mlp_out_norm=norm(norms.after),
        mixer=None if layer.mixer is None else _mixer(new, layer.mixer, spec.hidden_size),
    )


def _mixer(new: _Allocator, mixer: MixerSpec, hidden: int) -> MixerWeights:
    conv = new(mixer.channels, mixer.kernel)
    if isinstance(mixer, ShortConvSpec):
        channels = mixer.channels
        return ShortConvWeights(
            into=new(3 * channels, hidden),
            out=new(hidden, channels),
            conv=conv,
            into_bias=new(3 * channels) if mixer.bias else None,
            out_bias=new(hidden) if mixer.bias else None,
            conv_bias=new(channels) if mixer.bias else None,
        )
    rows, heads = sum(mixer.parts), mixer.num_heads
    return Mamba2Weights(
        into=new(rows, hidden),
        out=new(hidden, mixer.inner),
        conv=conv,
        steps=new.float(heads),
        decay=new.float(heads),
        skip=new.float(heads),
        into_bias=new(rows) if mixer.proj_bias else None,
        out_bias=new(hidden) if mixer.out_bias else None,
        conv_bias=new(mixer.channels) if mixer.conv_bias else None,
        norm=new(mixer.inner) if mixer.gated_norm else None,
    )


def _attention(new: _Allocator, spec: ModelSpec, a: AttentionSpec) -> AttentionWeights:
    hidden, dim = spec.hidden_size, a.head_dim
    rows = (a.num_heads + 2 * a.num_kv_heads) * dim
    q_heads, kv_heads = (1, 1) if a.qk_norm == "head" else (a.num_heads, a.num_kv_heads)
    normed = a.qk_norm is not None and a.num_heads > 0
    return AttentionWeights(
        qkv=new(rows, hidden),
        o=new(hidden, a.num_heads * dim),
        qkv_bias=new(rows) if a.qkv_bias else None,
        o_bias=new(hidden) if a.o_bias else None,
        q_norm=new.norm(q_heads * dim, spec) if normed else None,
        k_norm=new.norm(kv_heads * dim, spec) if normed else None,
        sinks=new(a.num_heads) if a.sinks else None,
    )


def _latent(new: _Allocator, spec: ModelSpec, a: AttentionSpec, latent: LatentSpec) -> LatentAttentionWeights:
    hidden, rank, q_rank = spec.hidden_size, latent.kv_rank, latent.q_rank
    return LatentAttentionWeights(
        q=new(a.num_heads * (latent.nope_dim + latent.rope_dim), q_rank or hidden),
        kv_down=new(rank + latent.rope_dim, hidden),
        kv_norm=new.norm(rank, spec),
        kv_up=new(a.num_heads, latent.nope_dim + latent.v_dim, rank),
        o=new(hidden, a.num_heads * latent.v_dim),
        q_down=new(q_rank, hidden) if q_rank else None,
        q_norm=new.norm(q_rank, spec) if q_rank else None,
        q_down_bias=new(q_rank) if q_rank and a.qkv_bias else None,
        kv_down_bias=new(rank + latent.rope_dim) if a.qkv_bias else None,
        o_bias=new(hidden) if a.o_bias else None,
    )


def _dense(new: _Allocator, mlp: DenseSpec, hidden: int) -> DenseWeights:
    inner = mlp.intermediate_size
    return DenseWeights(
        gate_up=new(2 * inner, hidden),
        down=new(hidden, inner),
        gate_up_bias=new(2 * inner) if mlp.bias else None,
        down_bias=new(hidden) if mlp.bias else None,
    )


def _experts(new: _Allocator, moe: MoESpec, hidden: int) -> ExpertWeights:
    experts, inner, routed = len(moe.experts), moe.intermediate_size, moe.router.num_experts
    return ExpertWeights(
        router=new.float(routed, hidden),
        gate_up=[new(2 * inner, hidden) for _ in range(experts)],
        down=[new(hidden, inner) for _ in range(experts)],
        router_bias=new.float(routed) if moe.router.bias else None,
        correction=new.float(routed) if moe.router.correction else None,
        gate_up_bias=new(experts, 2 * inner) if moe.bias else None,
        down_bias=new(experts, hidden) if moe.bias else None,
        shared=_dense(new, DenseSpec(moe.shared_size), hidden) if moe.shared_size else None,
        shared_gate=new(1, hidden) if moe.shared_gate else None,
    )
