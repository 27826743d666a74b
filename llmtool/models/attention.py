"""A layer's attention over paged KV: grouped heads, or DeepSeek's latent attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmtool_kernels import dispatch
from llmtool_kernels.attention import AttentionBatch, KVLayout, paged_attention
from torch import Tensor

from llmtool.models.ops import Rotation, linear, rms_norm, rotate
from llmtool.models.part import Part
from llmtool.models.weights import AttentionWeights, LatentAttentionWeights
from llmtool.modelspec import AttentionSpec, LatentSpec, LayerSpec, NormSpec


@dataclass(frozen=True, slots=True)
class QKNorm:
    """A norm over all heads of a token, of which a stage's ranks have parts (OLMo-2). heads, kv_heads: of the whole
    layer; owns_kv: no rank before this one has the same KV heads."""

    part: Part
    heads: int
    kv_heads: int
    owns_kv: bool

    @classmethod
    def of(cls, part: Part, i: int) -> QKNorm | None:
        """For layer i of the rank's; None where norms, if any, are over single heads."""
        shard = part.shard
        a = shard.whole.attention_of(shard.whole.layers[shard.layers[i]])
        if a.qk_norm != "all":
            return None
        return cls(part, a.num_heads, a.num_kv_heads, shard.parts[i].owns_kv)

    def __call__(
        self, q: Tensor, k: Tensor, w: AttentionWeights, dim: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        """q [N, own heads * dim], k [N, own KV heads * dim], normed."""
        assert w.q_norm is not None and w.k_norm is not None
        squares = torch.stack(
            [q.float().square().sum(-1), k.float().square().sum(-1) * float(self.owns_kv)], dim=-1
        )  # [N, 2]
        squares = self.part.peers.sum(squares)
        means = squares / squares.new_tensor([self.heads * dim, self.kv_heads * dim])
        scales = torch.rsqrt(means + eps)
        q = (q.float() * scales[:, :1]).to(q.dtype) * w.q_norm
        k = (k.float() * scales[:, 1:]).to(k.dtype) * w.k_norm
        return q, k


LayerKV = tuple[Tensor, KVLayout, AttentionBatch]  # the arena, where this layer lies in its pages, the step


def attend(
    x: Tensor,
    w: AttentionWeights,
    spec: AttentionSpec,
    norms: NormSpec,
    layer: LayerSpec,
    rotation: Rotation | None,
    kv: LayerKV,
    norm: QKNorm | None = None,
) -> Tensor:
    """Attention's output [N, hidden] for x [N, hidden]; writes the step's KV. norm: over heads of other ranks
    too."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    qkv = linear(x, w.qkv, w.qkv_bias)
    q, k, v = qkv.split((heads * dim, kv_heads * dim, kv_heads * dim), dim=-1)
    qk_norm = spec.qk_norm
    if norm is not None:
        (q, k), qk_norm = norm(q, k, w, dim, norms.eps), None
    if dispatch.on_gpu(qkv):
        from llmtool_kernels.gpu.attention import read_pages
        from llmtool_kernels.gpu.qkv import qkv_post

        q, k, v = (t.unflatten(-1, (-1, dim)) for t in (q, k, v))  # [N, heads, D]
        q = qkv_post(q, k, v, *kv, qk_norm, w.q_norm, w.k_norm, norms.eps, rotation)
        out = read_pages(q, *kv, spec.scale, layer.window, spec.softcap, w.sinks)
        return linear(out.flatten(1), w.o, w.o_bias)
    if qk_norm == "all":
        q, k = _normed(q, k, w, norms.eps)
    q, k, v = (t.unflatten(-1, (-1, dim)) for t in (q, k, v))  # [N, heads, D]
    if qk_norm == "head":
        q, k = _normed(q, k, w, norms.eps)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    out = paged_attention(
        q, k, v, *kv, scale=spec.scale, window=layer.window, softcap=spec.softcap, sinks=w.sinks
    )  # [N, Hq, D]
    return linear(out.flatten(1), w.o, w.o_bias)


def attend_latent(
    x: Tensor,
    w: LatentAttentionWeights,
    spec: AttentionSpec,
    latent: LatentSpec,
    norms: NormSpec,
    rotation: Rotation | None,
    kv: LayerKV,
) -> Tensor:
    """The same for latent attention, in its absorbed form (DeepSeek-V2, section 2.1.2).

    A token's cached row is [latent, rotary key]. Queries are taken into the latent's space, where the row is the
    key of all heads and its latent their value, and values are taken out of it after the sum.
    """
    if w.q_down is not None and w.q_norm is not None:
        x_q = rms_norm(linear(x, w.q_down, w.q_down_bias), w.q_norm, norms.eps)
    else:
        x_q = x
    q = linear(x_q, w.q).unflatten(-1, (spec.num_heads, -1))  # [N, Hq, nope + rope]
    q_nope, q_rope = q.split((latent.nope_dim, latent.rope_dim), dim=-1)
    row, k_rope = linear(x, w.kv_down, w.kv_down_bias)[:, None].split(
        (latent.kv_rank, latent.rope_dim), dim=-1
    )
    row = rms_norm(row, w.kv_norm, norms.eps)  # [N, 1, kv_rank]
    if rotation is not None:
        q_rope, k_rope = rotate(q_rope, rotation), rotate(k_rope, rotation)
    key_up, value_up = w.kv_up.split(
        (latent.nope_dim, latent.v_dim), dim=1
    )  # [Hq, nope, rank], [Hq, v, rank]
    q_latent = torch.bmm(q_nope.transpose(0, 1), key_up).transpose(0, 1)  # [N, Hq, rank]
    out = paged_attention(
        torch.cat((q_latent, q_rope), dim=-1),
        torch.cat((row, k_rope), dim=-1),
        None,
        *kv,
        scale=spec.scale,
        value_dim=latent.kv_rank,
    )  # [N, Hq, rank]
    values = torch.bmm(out.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1)  # [N, Hq, v]
    return linear(values.flatten(1), w.o, w.o_bias)


def _normed(q: Tensor, k: Tensor, w: AttentionWeights, eps: float) -> tuple[Tensor, Tensor]:
    assert w.q_norm is not None and w.k_norm is not None
    return rms_norm(q, w.q_norm, eps), rms_norm(k, w.k_norm, eps)
