"""The decoder of the Llama family: Llama, SmolLM, Mistral, Qwen2 (biased qkv), Qwen3 (normed q and k).

Inference only. Weights lie in small dataclasses and are used with `F.linear`; q, k and v are one matrix, gate
and up another. The tokens of all sequences of a step come as one flat list of N, whichever they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llmtool_kernels.attention import AttentionBatch, KVLayout, paged_attention
from torch import Tensor

from llmtool.models.rope import RotaryEmbedding
from llmtool.modelspec import ModelSpec


@dataclass(frozen=True, slots=True)
class KVContext:
    """A step's KV memory. arena: uint8 [bytes]. layers: layer -> where its KV lies, and its group's batch."""

    arena: Tensor
    layers: Mapping[int, tuple[KVLayout, AttentionBatch]]


@dataclass(slots=True)
class LayerWeights:
    """One layer, [out, in] as `F.linear` wants it. Rows of qkv: q, k, v heads; of gate_up: gate, up."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(Hq + 2 Hkv) * D, hidden]
    o: Tensor  # [hidden, Hq * D]
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]


@dataclass(slots=True)
class DecoderWeights:
    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]; the embedding itself when tied


class Decoder:
    """A model that runs: `forward` for hidden states, `logits` for the rows one wants to sample."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.weights = weights
        self.rope = RotaryEmbedding(spec.rope, spec.head_dim, weights.embedding.device)

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def forward(self, input_ids: Tensor, positions: Tensor, kv: KVContext) -> Tensor:
        """Hidden states [N, hidden] of tokens input_ids [N] at positions [N]; writes their KV to kv.arena."""
        spec = self.spec
        cos, sin = self.rope(positions)  # each float32 [N, 1, D/2]
        hidden = F.embedding(input_ids, self.weights.embedding)  # [N, hidden]
        for i, layer in enumerate(self.weights.layers):
            normed = rms_norm(hidden, layer.attention_norm, spec.norm_eps)
            hidden = hidden + self._attention(i, layer, normed, cos, sin, kv)
            hidden = hidden + swiglu(rms_norm(hidden, layer.mlp_norm, spec.norm_eps), layer)
        return rms_norm(hidden, self.weights.norm, spec.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocab] of hidden states [S, hidden]."""
        return F.linear(hidden, self.weights.lm_head).float()

    def _attention(
        self, i: int, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, kv: KVContext
    ) -> Tensor:
        spec = self.spec
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, dim))  # [N, Hq + 2 Hkv, D]
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, spec.norm_eps), rms_norm(k, layer.k_norm, spec.norm_eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        layout, batch = kv.layers[i]
        out = paged_attention(q, k, v, kv.arena, layout, batch, dim**-0.5, spec.windows[i])  # [N, Hq, D]
        return F.linear(out.flatten(1), layer.o, layer.o_bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the mean of squares in float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, H, D] turned in float32 by cos, sin [N, 1, D/2]; dimensions i and i + D/2 are a pair."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def swiglu(x: Tensor, layer: LayerWeights) -> Tensor:
    gate, up = F.linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
