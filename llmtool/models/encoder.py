"""The encoder that runs every family of modelspec.encoder, and how its token vectors become one per sequence.

Inference only. The tokens of all sequences of a step come as one flat list, so that the linear layers, which are
nearly all of the work, never see padding. Only attention needs to know where a sequence ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtool.models.encoder_weights import Affine, EncoderLayerWeights, EncoderWeights
from llmtool.modelspec import EncoderSpec

# Sequences are padded to the longest of their group for attention where the group's padding stays below this part
# of it: a call of attention costs as much as the waste of many short sequences.
MAX_WASTE = 0.25
RELATIVE_DISTANCE = 128  # from here on all distances share MPNet's last bucket


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Neighbouring sequences that attention runs together: rows [start, stop) of the step's tokens.

    rows: [B, L] int64, the tokens of B sequences padded to L, and where: [tokens] int64, the place of each token
    among those B * L. keep: bool [B, 1, 1, L], which are no padding. None where all lengths are equal.
    """

    start: int
    stop: int
    count: int
    length: int
    rows: Tensor | None = None
    where: Tensor | None = None
    keep: Tensor | None = None


def attention_groups(lengths: Sequence[int], device: torch.device) -> list[AttentionGroup]:
    """Groups of neighbours; `lengths` of the sequences in their order, best sorted."""
    groups: list[AttentionGroup] = []
    start = first = 0
    while first < len(lengths):
        end, tokens, longest = first, 0, 0
        while end < len(lengths):
            peak, total = max(longest, lengths[end]), tokens + lengths[end]
            if peak * (end + 1 - first) * (1 - MAX_WASTE) > total:
                break
            longest, tokens, end = peak, total, end + 1
        groups.append(_group(lengths[first:end], start, longest, device))
        start, first = start + tokens, end
    return groups


def _group(lengths: Sequence[int], start: int, longest: int, device: torch.device) -> AttentionGroup:
    count, stop = len(lengths), start + sum(lengths)
    if all(length == longest for length in lengths):
        return AttentionGroup(start, stop, count, longest)
    sizes = torch.tensor(lengths)[:, None]  # [B, 1]
    places = torch.arange(longest)  # [L]
    keep = places < sizes  # [B, L]
    begins = sizes.cumsum(0) - sizes + start  # [B, 1]
    rows = torch.where(keep, begins + places, begins)  # padding repeats a token: any number does, but no NaN
    where = keep.flatten().nonzero().flatten()
    return AttentionGroup(
        start, stop, count, longest, rows.to(device), where.to(device), keep[:, None, None].to(device)
    )


class NativeEncoder:
    """Every family of llmtool.modelspec.encoder."""

    def __init__(self, spec: EncoderSpec, weights: EncoderWeights) -> None:
        self.spec = spec
        self.weights = weights

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def forward(
        self, input_ids: Tensor, positions: Tensor, token_types: Tensor | None, groups: list[AttentionGroup]
    ) -> Tensor:
        """Hidden states [N, hidden] of tokens input_ids [N] at positions [N], each counted from 0 in its sequence.

        token_types: int64 [N], None where all are 0.
        """
        spec, w = self.spec, self.weights
        hidden = F.embedding(input_ids, w.embedding)  # [N, hidden]
        hidden = hidden + F.embedding(positions + spec.position_offset, w.positions)
        if w.token_types is not None:
            types = w.token_types[0] if token_types is None else F.embedding(token_types, w.token_types)
            hidden = hidden + types
        hidden = self._norm(hidden, w.norm)
        biases = [self._bias(group.length) for group in groups]
        for layer in w.layers:
            x = self._attention(hidden, layer, groups, biases)
            hidden = self._norm(hidden + _linear(x, layer.o), layer.attention_norm)
            x = _activate(_linear(hidden, layer.up), spec.activation)
            hidden = self._norm(hidden + _linear(x, layer.down), layer.mlp_norm)
        return hidden

    def classify(self, first: Tensor) -> Tensor:
        """float32 logits [S, labels] of the first token's hidden states [S, hidden]."""
        head, w = self.spec.head, self.weights
        assert head is not None and w.dense is not None and w.out is not None
        x = _linear(first, w.dense)
        return _linear(torch.tanh(x) if head.activation == "tanh" else torch.relu(x), w.out).float()

    def _norm(self, x: Tensor, w: Affine) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), w.weight, w.bias, self.spec.norm_eps)

    def _attention(
        self,
        hidden: Tensor,
        layer: EncoderLayerWeights,
        groups: list[AttentionGroup],
        biases: list[Tensor | None],
    ) -> Tensor:
        """[N, hidden] before the output projection."""
        shape = (3, self.spec.num_heads, self.spec.head_dim)
        qkv = _linear(hidden, layer.qkv)  # [N, 3 * hidden]
        parts = []
        for group, bias in zip(groups, biases, strict=True):
            x = qkv[group.start : group.stop] if group.rows is None else qkv[group.rows.flatten()]
            x = x.view(group.count, group.length, *shape).permute(2, 0, 3, 1, 4)  # [3, B, H, L, D]
            mask = group.keep
            if bias is not None:
                mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
            out = F.scaled_dot_product_attention(x[0], x[1], x[2], mask)  # [B, H, L, D]
            out = out.transpose(1, 2).reshape(group.count * group.length, -1)
            parts.append(out if group.where is None else out[group.where])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bias(self, length: int) -> Tensor | None:
        """MPNet's bias of attention by distance, [1, H, L, L]."""
        table = self.weights.relative_bias
        if table is None:
            return None
        places = torch.arange(length, device=self.device)
        buckets = relative_bucket(places[None, :] - places[:, None], self.spec.relative_buckets)
        return F.embedding(buckets, table).permute(2, 0, 1)[None]


def relative_bucket(distance: Tensor, buckets: int) -> Tensor:
    """Bucket of key - query distances, as T5 and MPNet number them: half of the buckets for each direction, of
    those half exact, the others logarithmically wider up to RELATIVE_DISTANCE."""
    half = buckets // 2
    exact = half // 2
    n = distance.abs()
    scaled = torch.log(n.clamp(min=1).float() / exact) / math.log(RELATIVE_DISTANCE / exact)
    wide = (exact + (scaled * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(n < exact, n, wide)


def pool(hidden: Tensor, lengths: Tensor, modes: Sequence[str]) -> Tensor:
    """float32 [S, modes * hidden]: one vector of each sequence's rows of hidden [N, hidden].

    lengths: int64 [S] on the hidden states' device. modes: of PoolingSpec, joined in their order.
    """
    ends = lengths.cumsum(0)
    pooled = []
    for mode in modes:
        if mode == "cls":
            pooled.append(hidden[ends - lengths].float())
        elif mode == "last":
            pooled.append(hidden[ends - 1].float())
        elif mode == "max":
            pooled.append(torch.segment_reduce(hidden.float(), "max", lengths=lengths))
        else:
            sums = torch.segment_reduce(hidden.float(), "sum", lengths=lengths)
            count = lengths[:, None].float()
            pooled.append(sums / (count if mode == "mean" else count.sqrt()))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


def _linear(x: Tensor, w: Affine) -> Tensor:
    return F.linear(x, w.weight, w.bias)


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "relu":
        return F.relu(x)
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
