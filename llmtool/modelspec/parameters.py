"""How many parameters a model has, by kind."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from llmtool.modelspec.parts import (
    AttentionSpec,
    DenseSpec,
    LatentSpec,
    MixerSpec,
    MoESpec,
    ShortConvSpec,
)

if TYPE_CHECKING:
    from llmtool.modelspec.spec import ModelSpec

Shape = tuple[str, int, int]  # kind, number of vectors, their length


def matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Parameters by kind as (number of vectors, their length), all layers together; tied ones once."""
    hidden = spec.hidden_size
    shapes: list[Shape] = [
        ("embedding", spec.vocab_size, hidden),
        ("lm_head", 0 if spec.tied_embeddings else spec.vocab_size, hidden),
        ("norms", 1, hidden),
    ]
    norms = 2 * (spec.norms.before + spec.norms.after)
    for layer in spec.layers:
        shapes.append(("norms", norms, hidden))
        shapes += _attention(spec.attention_of(layer), hidden)
        if layer.mixer is not None:
            shapes += _mixer(layer.mixer, hidden)
        shapes += _dense(layer.mlp, hidden) if isinstance(layer.mlp, DenseSpec) else _moe(layer.mlp, hidden)
    vectors: Counter[str] = Counter()
    lengths: dict[str, int] = {}
    for kind, count, length in shapes:
        if count and length:
            if lengths.get(kind, length) != length:  # pruned layers have widths of their own
                kind = f"{kind}_{length}"
            lengths[kind] = length
            vectors[kind] += count
    return {kind: (vectors[kind], lengths[kind]) for kind in lengths}


def _attention(a: AttentionSpec, hidden: int) -> list[Shape]:
    if a.latent is not None:
        return _latent_attention(a, a.latent, hidden)
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes = [
        ("qkv", q + 2 * kv, hidden),
        ("o", hidden, q),
        ("qkv_bias", int(a.qkv_bias), q + 2 * kv),
        ("o_bias", int(a.o_bias), hidden),
        ("sinks", int(a.sinks), a.num_heads),
    ]
    if a.qk_norm == "head" and a.num_heads:
        shapes.append(("qk_norm", 2, a.head_dim))
    if a.qk_norm == "all":
        shapes += [("q_norm", 1, q), ("k_norm", 1, kv)]
    return shapes


def _latent_attention(a: AttentionSpec, latent: LatentSpec, hidden: int) -> list[Shape]:
    q_rows, rank = a.num_heads * (latent.nope_dim + latent.rope_dim), latent.kv_rank
    shapes = [
        ("kv_down", rank + latent.rope_dim, hidden),
        ("kv_norm", 1, rank),
        ("kv_up", a.num_heads * (latent.nope_dim + latent.v_dim), rank),
        ("o", hidden, a.num_heads * latent.v_dim),
        ("kv_down_bias", int(a.qkv_bias), rank + latent.rope_dim),
        ("o_bias", int(a.o_bias), hidden),
    ]
    if latent.q_rank is None:
        return [*shapes, ("q", q_rows, hidden)]
    return [
        *shapes,
        ("q_down", latent.q_rank, hidden),
        ("q_norm", 1, latent.q_rank),
        ("q_up", q_rows, latent.q_rank),
        ("q_down_bias", int(a.qkv_bias), latent.q_rank),
    ]


def _mixer(mixer: MixerSpec, hidden: int) -> list[Shape]:
    conv = ("conv", mixer.channels, mixer.kernel)
    if isinstance(mixer, ShortConvSpec):
        biases = ("conv_bias", int(mixer.bias), 5 * hidden)
        return [("conv_in", 3 * hidden, hidden), ("conv_out", hidden, hidden), conv, biases]
    rows = sum(mixer.parts)
    return [
        ("ssm_in", rows, hidden),
        ("ssm_out", hidden, mixer.inner),
        conv,
        ("conv_bias", int(mixer.conv_bias), mixer.channels),
        ("ssm_in_bias", int(mixer.proj_bias), rows),
        ("ssm_out_bias", int(mixer.out_bias), hidden),
        ("ssm_heads", 3, mixer.num_heads),
        ("ssm_norm", int(mixer.gated_norm is not None), mixer.inner),
    ]


def _dense(mlp: DenseSpec, hidden: int) -> list[Shape]:
    inner = mlp.intermediate_size
    return [
        ("gate_up", 2 * inner, hidden),
        ("down", hidden, inner),
        ("mlp_bias", int(mlp.bias), 2 * inner + hidden),
    ]


def _moe(moe: MoESpec, hidden: int) -> list[Shape]:
    experts, inner, shared = len(moe.experts), moe.intermediate_size, moe.shared_size
    return [
        ("router", moe.router.num_experts, hidden),
        ("router_bias", moe.router.bias + moe.router.correction, moe.router.num_experts),
        ("expert_gate_up", experts * 2 * inner, hidden),
        ("expert_down", experts * hidden, inner),
        ("expert_bias", experts * int(moe.bias), 2 * inner + hidden),
        ("shared_gate_up", 2 * shared, hidden),
        ("shared_down", hidden if shared else 0, shared),
        ("shared_gate", int(moe.shared_gate), hidden),
    ]
