"""Decoders: what one must offer to be served, and the one that runs every native family.

Inference only. The tokens of all sequences of a step come as one flat list of N, whichever they belong to. What
a layer does (which norms, which rotary embedding, which window, which MLP) is in its ModelSpec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from llmtool_kernels.attention import AttentionBatch, KVLayout
from torch import Tensor

from llmtool.models.attention import LayerKV, QKNorm, attend, attend_latent
from llmtool.models.mlp import dense, mixture, shared_mixture
from llmtool.models.ops import Rotation, add_rms_norm, embed, embed_part, linear, rms_norm
from llmtool.models.part import Part
from llmtool.models.recurrent import LayerState, StateBatch, StatePlace, mix
from llmtool.models.rope import RotaryEmbedding
from llmtool.models.weights import AttentionWeights, DecoderWeights, DenseWeights, LayerWeights
from llmtool.modelspec import DenseSpec, LayerSpec, ModelSpec, MoESpec

LayerPlace = tuple[KVLayout, int]


@dataclass(frozen=True, slots=True)
class KVContext:
    """A step's KV memory. arena: uint8 [bytes]. layers: layer -> where its KV lies in its group's pages, and the
    number of that group: the same object in every step of an engine. batches: the step, a batch per group. states:
    layer -> where its state lies, of layers that have one."""

    arena: Tensor
    layers: Mapping[int, LayerPlace]
    batches: Sequence[AttentionBatch | StateBatch]
    states: Mapping[int, StatePlace] = field(default_factory=dict)

    def layer(self, i: int) -> LayerKV:
        """What the attention of layer i needs."""
        layout, group = self.layers[i]
        batch = self.batches[group]
        assert isinstance(batch, AttentionBatch)
        return self.arena, layout, batch

    def state(self, i: int) -> LayerState:
        """What the mixer of layer i needs."""
        place = self.states[i]
        batch = self.batches[place.group]
        assert isinstance(batch, StateBatch)
        return self.arena, place, batch


class Decoder(Protocol):
    """A model that runs: `forward` for hidden states, `logits` for the rows one wants to sample."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; weights and KV may be in fewer bits."""
        ...

    @property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        """Layer -> what its keys and values are divided by in eight bits, as the checkpoint says; 1 without."""
        ...

    @property
    def weight_bytes(self) -> int: ...

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv: KVContext, wanted: Tensor | None = None
    ) -> Tensor:
        """Hidden states [N, hidden] of tokens input_ids [N] at positions [N], or [M, hidden] of the
        rows `wanted` [M] alone; writes the KV of all to kv.arena. What is returned may be overwritten by the
        next call."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocab] of hidden states [S, hidden]."""
        ...


class StageDecoder(Decoder, Protocol):
    """A rank's part of one: `forward` begins with what the stage before has returned and ends with what the next
    one is given, and `logits` has the rank's part of the vocabulary."""

    @property
    def stream(self) -> torch.dtype:
        """Of the hidden states between stages."""
        ...

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv: KVContext,
        wanted: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """hidden: [N, hidden] of the stage before; None for the first one, which looks tokens up. wanted: for the
        last stage alone."""
        ...


class NativeDecoder:
    """Every family of llmtool.modelspec.families."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        max_length: int | None = None,
        part: Part | None = None,
    ) -> None:
        """max_length: tokens of the longest sequence to come, which decides between longrope's two embeddings.
        part: what the weights are of a model, if they are not all; spec is then that part's."""
        self.spec = spec
        self.weights, self.max_length = weights, max_length
        self.part = part
        ropes = spec.ropes
        self._ropes = [RotaryEmbedding(rope, self.device, max_length or spec.max_positions) for rope in ropes]
        self._rope_of = [None if layer.rope is None else ropes.index(layer.rope) for layer in spec.layers]
        # Gemma rounds it to the weights' type before it multiplies.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=self.dtype).item()

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        return self.weights.kv_scales

    @property
    def weight_bytes(self) -> int:
        return self.weights.nbytes

    @property
    def stream(self) -> torch.dtype:
        return self.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv: KVContext,
        wanted: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        eps, scale = self.spec.norms.eps, self.spec.residual_scale
        rotations = [rope(positions) for rope in self._ropes]
        if hidden is None:
            hidden = self._embed(input_ids)  # [N, hidden]
        layers = self.weights.layers
        x = hidden if layers[0].attention_norm is None else rms_norm(hidden, layers[0].attention_norm, eps)
        for i, (layer, w) in enumerate(zip(self.spec.layers, layers, strict=True)):
            rope = self._rope_of[i]
            mixed = None
            if layer.mixer is not None and w.mixer is not None:
                mixed = mix(x, w.mixer, layer.mixer, eps, kv.state(i), self.part)
            if self.spec.attention_of(layer).num_heads:
                x = self._attention(i, x, layer, w, None if rope is None else rotations[rope], kv.layer(i))
                x = x if mixed is None else x + mixed
            else:  # a layer that only has a state, or, pruned, mixes nothing
                x = torch.zeros_like(hidden) if mixed is None else mixed
            if wanted is not None and i + 1 == len(layers):
                hidden, x = hidden[wanted], x[wanted]
                if not len(wanted):
                    return hidden
            if self.part is not None and self.part.shard.mixes(i):
                x = self.part.peers.sum(x)
            hidden, x = add_rms_norm(hidden, x, w.attention_out_norm, w.mlp_norm, eps, scale)
            x = self._mlp(x, layer, w)
            following = layers[i + 1].attention_norm if i + 1 < len(layers) else self._final_norm
            hidden, x = add_rms_norm(hidden, x, w.mlp_out_norm, following, eps, scale)
        return x

    @property
    def _final_norm(self) -> Tensor | None:
        """Of the last layer's output; a stage that is followed by another hands it on as it is."""
        return self.weights.norm if self.part is None or self.part.shard.last else None

    def _embed(self, input_ids: Tensor) -> Tensor:
        table = self.weights.embedding
        if self.part is None:
            hidden = embed(input_ids, table, self.dtype)
        else:
            mine = embed_part(input_ids, table, self.dtype, self.part.shard.embedding)
            hidden = self.part.peers.sum(mine)
        # Gemma rounds it to the weights' type before it multiplies.
        return hidden if self._embedding_scale == 1.0 else hidden * self._embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        return finish_logits(linear(hidden, self.weights.lm_head).float(), self.spec)

    def _attention(
        self, i: int, x: Tensor, layer: LayerSpec, w: LayerWeights, rotation: Rotation | None, kv: LayerKV
    ) -> Tensor:
        spec, norms = self.spec.attention_of(layer), self.spec.norms
        if isinstance(w.attention, AttentionWeights):
            return attend(
                x,
                w.attention,
                spec,
                norms,
                layer,
                rotation,
                kv,
                None if self.part is None else QKNorm.of(self.part, i),
            )
        assert spec.latent is not None
        return attend_latent(x, w.attention, spec, spec.latent, norms, rotation, kv)

    def _mlp(self, x: Tensor, layer: LayerSpec, w: LayerWeights) -> Tensor:
        if isinstance(w.mlp, DenseWeights):
            assert isinstance(layer.mlp, DenseSpec)
            y = dense(x, w.mlp, layer.mlp.gate)
            return y if self.part is None else self.part.peers.sum(y)
        assert isinstance(layer.mlp, MoESpec)
        return (
            mixture(x, w.mlp, layer.mlp)
            if self.part is None
            else shared_mixture(x, w.mlp, layer.mlp, self.part)
        )


def finish_logits(logits: Tensor, spec: ModelSpec) -> Tensor:
    """What comes after the output head, in place where it can be. logits: float32 [S, vocab]."""
    if spec.logits_divisor != 1.0:
        logits /= spec.logits_divisor
    cap = spec.logits_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap
