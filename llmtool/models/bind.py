"""Loaded matrices in the form that runs: in the CPU kernels' panels, in fewer bits, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llmtool_kernels.cpu.linear import Gate, PackedLinear
from llmtool_kernels.cpu.native import Native
from llmtool_kernels.cpu.weights import (
    MAX_GROUP,
    PackedWeight,
    QuantizedWeight,
    pack,
    pack_compact,
    pack_quantized,
    quantize,
)
from torch import Tensor

from llmtool.models.weights import (
    AttentionWeights,
    DecoderWeights,
    DenseWeights,
    ExpertWeights,
    LatentAttentionWeights,
    Matrix,
    as_tensor,
)
from llmtool.modelspec import DenseSpec, GateSpec, ModelSpec, MoESpec

QUANTIZATIONS = {"int8": 8, "int4": 4}
GROUPS = {8: 192, 4: 64}  # columns that share a scale, at most
HEAD_BITS = 8  # the output head decides between near-equal tokens: it keeps 8 bits

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix in fewer bits where no kernel multiplies by it: dequantized whenever it is used, to x's type."""

    weight: QuantizedWeight
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.q.nbytes + self.weight.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize().to(x.dtype), self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        q, scales = self.weight.q[ids], self.weight.scales[ids]
        return QuantizedWeight(q, scales, self.weight.bits).dequantize()


@dataclass(frozen=True, slots=True)
class Binder:
    """Makes bound matrices. native: the CPU kernels, None for torch. bits: 8, 4 or None for the loaded type."""

    native: Native | None
    bits: int | None = None

    def __call__(
        self,
        matrix: Matrix,
        bias: Tensor | None = None,
        gate: GateSpec | None = None,
        bits: int | None = None,
    ) -> Matrix:
        """matrix [n, k], on its way out of memory. gate: its rows are gates, then ups, to be joined by it."""
        weight = as_tensor(matrix)
        if not weight.numel():  # of a pruned layer without heads or neurons
            return matrix
        bits = min(bits or 8, self.bits) if self.bits is not None else None
        group = 0 if bits is None else group_size(weight.shape[1], GROUPS[bits])
        if bits is not None and group:
            quantized = quantize(weight, bits, group)
            if self.native is None:
                return QuantizedMatrix(quantized, bias)
            return self._packed(pack_quantized(quantized, gate is not None), bias, gate)
        if self.native is None:
            return matrix
        gated = gate is not None
        # Fewer bytes only help where bfloat16 has instructions: elsewhere taking them apart costs more.
        small = pack_compact(weight, self.native, gated) if self.native.isa != "portable" else None
        return self._packed(small or pack(weight, self.native, gated), bias, gate)

    def _packed(self, weight: PackedWeight, bias: Tensor | None, gate: GateSpec | None) -> PackedLinear:
        assert self.native is not None
        how = Gate() if gate is None else Gate(gate.kind, gate.alpha, gate.limit)
        return PackedLinear(weight, self.native, bias, how)


def group_size(k: int, most: int) -> int:
    """The largest divisor of k that is a multiple of 8 and at most `most`; 0 when there is none."""
    assert most <= MAX_GROUP
    return next((g for g in range(most // 8 * 8, 0, -8) if k % g == 0), 0)


@torch.no_grad()
def bind(
    spec: ModelSpec,
    weights: DecoderWeights,
    binder: Binder,
    progress: Progress | None = None,
    embedding: bool = False,
) -> None:
    """Bind all matrices of `weights` in place, one after the other, so that memory grows by one at a time.

    Routers stay: a rounded score may choose another expert. So do latent attention's kv_up, which is used by
    parts, and an embedding that is not tied, unless `embedding` asks for it.
    """
    for i, (layer, w) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        _attention(w.attention, binder)
        if w.mixer is not None:
            w.mixer.into, w.mixer.out = (
                binder(w.mixer.into, w.mixer.into_bias),
                binder(w.mixer.out, w.mixer.out_bias),
            )
        if isinstance(w.mlp, DenseWeights):
            assert isinstance(layer.mlp, DenseSpec)
            _dense(w.mlp, binder, layer.mlp.gate)
        else:
            assert isinstance(layer.mlp, MoESpec)
            _experts(w.mlp, binder, layer.mlp.gate)
        if progress is not None:
            progress(i + 1, len(weights.layers))
    weights.lm_head = binder(weights.lm_head, bits=HEAD_BITS)
    if spec.tied_embeddings:
        weights.embedding = weights.lm_head
    elif embedding:
        weights.embedding = binder(weights.embedding, bits=HEAD_BITS)


def _attention(w: AttentionWeights | LatentAttentionWeights, binder: Binder) -> None:
    w.o = binder(w.o, w.o_bias)
    if isinstance(w, AttentionWeights):
        w.qkv = binder(w.qkv, w.qkv_bias)
        return
    w.q = binder(w.q)
    w.kv_down = binder(w.kv_down, w.kv_down_bias)
    if w.q_down is not None:
        w.q_down = binder(w.q_down, w.q_down_bias)


def _dense(w: DenseWeights, binder: Binder, gate: GateSpec) -> None:
    w.gate_up = binder(w.gate_up, w.gate_up_bias, gate)
    w.down = binder(w.down, w.down_bias)


def _experts(w: ExpertWeights, binder: Binder, gate: GateSpec) -> None:
    for e in range(len(w.gate_up)):
        w.gate_up[e] = binder(w.gate_up[e], None if w.gate_up_bias is None else w.gate_up_bias[e], gate)
        w.down[e] = binder(w.down[e], None if w.down_bias is None else w.down_bias[e])
    if w.shared is not None:
        _dense(w.shared, binder, gate)
