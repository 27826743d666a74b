"""A native family on the CPU kernels: a step is one list of operations, run by one team of threads.

The list is built once per size of a step from the same ModelSpec and weights that NativeDecoder runs, and holds
pointers into buffers that are used again in every step. What has no operation (latent attention, the choice of
experts) runs in torch between two parts of the list, with the same functions as NativeDecoder's. A rank's part of a
model has its list cut wherever its stage sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llmtool_kernels.attention import AttentionBatch, KVLayout
from llmtool_kernels.cpu.abi import TILES
from llmtool_kernels.cpu.attention import arrangement
from llmtool_kernels.cpu.linear import PackedLinear
from llmtool_kernels.cpu.native import Native
from llmtool_kernels.cpu.program import Program, StepState
from torch import Tensor

from llmtool.models.attention import QKNorm, attend_latent
from llmtool.models.decoder import KVContext, LayerPlace, finish_logits
from llmtool.models.mlp import mixture, shared_mixture
from llmtool.models.ops import Rotation, embed_part
from llmtool.models.part import Part
from llmtool.models.rope import RotaryEmbedding
from llmtool.models.weights import (
    AttentionWeights,
    DecoderWeights,
    DenseWeights,
    ExpertWeights,
    LatentAttentionWeights,
    LayerWeights,
    Matrix,
    as_tensor,
)
from llmtool.modelspec import DenseSpec, LayerSpec, ModelSpec, MoESpec

MAX_HEAD = 1024  # llmtool_kernels/cpu/csrc/run.cpp


@dataclass(frozen=True, slots=True)
class Step:
    """What parts of a step read. state: for a Program; the rest: for torch."""

    n: int
    state: StepState
    rotations: Sequence[Rotation]
    kv: KVContext


Piece = Program | Callable[[Step], None]


class CpuDecoder:
    """A `Decoder` whose matrices are all packed (llmtool/models/bind.py). The residual stream is in float32."""

    stream = torch.float32

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        native: Native,
        max_length: int | None = None,
        part: Part | None = None,
    ) -> None:
        """weights: of `dtype` float32 or bfloat16, bound. max_length, part: as NativeDecoder's."""
        self.spec = spec
        self.part = part
        self.weights, self.native, self.max_length = weights, native, max_length
        self.dtype = weights.dtype
        self.device = torch.device("cpu")
        self.kv_scales = weights.kv_scales
        self.weight_bytes = weights.nbytes
        self._layers = weights.layers
        self._head = packed(weights.lm_head) if part is None or part.shard.last else None
        tied = spec.tied_embeddings and part is None  # read from the packed head: it is in memory once
        self._embedding = None if tied else weights.embedding
        self._norm = weights.norm.float()
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=self.dtype).item()
        ropes = spec.ropes
        self._ropes = [RotaryEmbedding(rope, self.device, max_length or spec.max_positions) for rope in ropes]
        windows = (layer.window for layer in spec.layers if layer.window is not None)
        self._shortest_window = min(windows, default=None)
        self._capacity = 0
        self._places: Mapping[int, LayerPlace] | None = None
        self._parts: list[Piece] = []
        self._tail: int | None = None
        self._attended: Tensor | None = None
        self._out = torch.empty(0)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv: KVContext,
        wanted: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        batches = [batch for batch in kv.batches if isinstance(batch, AttentionBatch)]
        assert len(batches) == len(kv.batches), "no operation moves a state on"
        for batch in batches:
            batch.check_window(self._shortest_window)
        n = len(input_ids)
        self._prepare(n, kv.layers)
        rotations = [rope(positions) for rope in self._ropes]
        step = Step(n, StepState(input_ids, kv.arena, batches, rotations), rotations, kv)
        if hidden is not None:
            self._residual[:n] = hidden
        elif self._embedding is not None:
            torch.mul(self._embed(input_ids), self._embedding_scale, out=self._residual[:n])
        self._run(self._parts[: self._tail], step)
        if wanted is not None:
            step = self._narrow(step, wanted)
        self._run(self._parts[self._tail :], step)
        last = self.part is None or self.part.shard.last
        return (self._out if last else self._residual)[: step.n]

    def logits(self, hidden: Tensor) -> Tensor:
        assert self._head is not None
        return finish_logits(self._head(hidden, torch.float32), self.spec)

    def _run(self, parts: Sequence[Piece], step: Step) -> None:
        if not step.n:
            return
        for part in parts:
            if isinstance(part, Program):
                part.run(step.state)
            else:
                part(step)

    def _narrow(self, step: Step, wanted: Tensor) -> Step:
        """The step of these rows alone, brought to the front, for what comes after the last layer's keys and
        values: of a prompt's tokens only the last one's logits are asked for."""
        m = len(wanted)
        for buffer in (self._residual, self._attended):
            if buffer is not None:
                buffer[:m] = buffer[wanted]
        return Step(m, StepState(wanted, step.kv.arena, (), ()), (), step.kv)

    @property
    def tiled(self) -> frozenset[int]:
        """The layers whose keys and values lie in tiles, once a step has run."""
        places, latent = self._places or {}, LatentAttentionWeights
        ours = {i for i, w in enumerate(self._layers) if not isinstance(w.attention, latent)}
        return frozenset(i for i, (layout, _) in places.items() if i in ours and arrangement(layout) == TILES)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """float32 [N, hidden]"""
        assert self._embedding is not None
        if self.part is None:
            return F.embedding(input_ids, as_tensor(self._embedding)).float()
        rows = self.part.shard.embedding
        return self.part.peers.sum(embed_part(input_ids, self._embedding, torch.float32, rows).float())

    # -- the list ------------------------------------------------------------------------------------------

    def _prepare(self, n: int, places: Mapping[int, LayerPlace]) -> None:
        """Have parts for n tokens and KV at these places."""
        assert all(layout.dtype is None for layout, _ in places.values()), (
            "operations read KV of the model's type"
        )
        if n > self._capacity or places is not self._places:
            self._capacity = max(n, self._capacity, 16)
            if n > 16:
                self._capacity = max(self._capacity, 1 << (n - 1).bit_length())
            self._places = places
            self._build(self._capacity, places)

    def _build(self, rows: int, places: Mapping[int, LayerPlace]) -> None:
        spec, eps = self.spec, self.spec.norms.eps
        self._residual = torch.empty(rows, spec.hidden_size)
        self._x = torch.empty(rows, spec.hidden_size, dtype=self.dtype)
        self._out = torch.empty(rows, spec.hidden_size, dtype=self.dtype)
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}
        self._parts, self._tail, self._attended = [], None, None
        if self._embedding is None:
            assert self._head is not None
            self._program().embed(self._head.weight, self._embedding_scale, self._residual)
        for i, (layer, w) in enumerate(zip(spec.layers, self._layers, strict=True)):
            if spec.attention_of(layer).num_heads:  # a pruned layer may have no heads, or no neurons
                self._program().rms_norm(self._residual, _float(w.attention_norm), eps, self._x)
                self._attention(i, layer, w, places[i], rows)
            elif self.part is not None and self.part.shard.mixes(i):  # its peers have the heads
                if i + 1 == spec.num_layers and spec.attention.latent is None:
                    self._begin_tail(None)  # where theirs begins
                self._nothing(w.attention_out_norm)
            if i + 1 == spec.num_layers and self._tail is None:
                self._begin_tail(None)
            if not isinstance(layer.mlp, DenseSpec) or layer.mlp.intermediate_size:
                self._program().rms_norm(self._residual, _float(w.mlp_norm), eps, self._x)
                self._mlp(layer, w, rows)
            elif self.part is not None:
                self._nothing(w.mlp_out_norm)
        if self.part is not None and not self.part.shard.last:
            return
        self._program().rms_norm(self._residual, self._norm, eps, self._out)

    def _program(self) -> Program:
        """The program at the end of the list."""
        if len(self._parts) in (0, self._tail) or not isinstance(self._parts[-1], Program):
            self._parts.append(Program(self.native))
        last = self._parts[-1]
        assert isinstance(last, Program)
        return last

    def _begin_tail(self, attended: Tensor | None) -> None:
        """What follows may run for fewer rows, of the residual stream and of `attended`."""
        self._tail, self._attended = len(self._parts), attended

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Scratch [rows, width], the same memory for all layers."""
        memory = self._scratch.get((name, dtype))
        if memory is None or memory.numel() < rows * width:
            memory = self._scratch[name, dtype] = torch.empty(rows * width, dtype=dtype)
        return memory[: rows * width].view(rows, width)

    def _attention(self, i: int, layer: LayerSpec, w: LayerWeights, place: LayerPlace, rows: int) -> None:
        if isinstance(w.attention, LatentAttentionWeights):
            self._latent(i, layer, w, w.attention)
            return
        spec, (layout, batch) = self.spec.attention_of(layer), place
        qkv = self._buffer("qkv", rows, packed(w.attention.qkv).out_features, torch.float32)
        q = self._buffer("q", rows, spec.num_heads * spec.head_dim, self.dtype)
        out = self._buffer("attended", rows, spec.num_heads * layout.v_head_dim, self.dtype)
        self._program().linear(self._x, packed(w.attention.qkv), qkv)
        norm = None if self.part is None else QKNorm.of(self.part, i)
        if norm is not None:
            self._norm_heads(norm, qkv, layer, w.attention)
        program = self._program()
        self._qkv_post(program, qkv, q, layer, w.attention, layout, batch, norm is None)
        program.attention(
            q, out, layout, batch, spec.scale, layer.window, spec.softcap, _float(w.attention.sinks)
        )
        if i + 1 == self.spec.num_layers:
            self._begin_tail(out)
        self._block_end(self._program(), out, packed(w.attention.o), w.attention_out_norm)

    def _qkv_post(
        self,
        program: Program,
        qkv: Tensor,
        q: Tensor,
        layer: LayerSpec,
        w: AttentionWeights,
        layout: KVLayout,
        batch: int,
        norm: bool,
    ) -> None:
        program.qkv_post(
            qkv,
            q,
            layout,
            batch,
            self.spec.norms.eps,
            self.spec.attention.qk_norm if norm else None,
            _float(w.q_norm),
            _float(w.k_norm),
            None if layer.rope is None else self.spec.ropes.index(layer.rope),
        )

    def _mlp(self, layer: LayerSpec, w: LayerWeights, rows: int) -> None:
        mlp = w.mlp
        if isinstance(mlp, ExpertWeights):
            assert isinstance(layer.mlp, MoESpec)
            self._mixture(layer.mlp, mlp, w.mlp_out_norm)
            return
        assert isinstance(mlp, DenseWeights)
        gate_up, down = packed(mlp.gate_up), packed(mlp.down)
        inner = self._buffer("inner", rows, gate_up.out_features, self.dtype)
        program = self._program()
        program.linear(self._x, gate_up, inner)
        self._block_end(program, inner, down, w.mlp_out_norm)

    def _block_end(self, program: Program, x: Tensor, linear: PackedLinear, norm: Tensor | None) -> None:
        """The residual stream grows by what a block returns: x through its last matrix, and its norm if any."""
        scale = self.spec.residual_scale
        if norm is None and self.part is None:
            program.linear(x, linear, self._residual, scale)
            return
        out = self._buffer("block", len(x), linear.out_features, torch.float32)
        program.linear(x, linear, out)
        if self.part is not None:
            peers = self.part.peers
            self._parts.append(lambda step: self._add(peers.sum(out[: step.n]), norm))
            return
        assert norm is not None
        program.rms_norm(out, norm.float(), self.spec.norms.eps, self._residual, scale)

    # -- parts in torch ------------------------------------------------------------------------------------

    def _latent(self, i: int, layer: LayerSpec, w: LayerWeights, attention: LatentAttentionWeights) -> None:
        spec = self.spec
        latent = spec.attention.latent
        assert latent is not None
        rope = None if layer.rope is None else spec.ropes.index(layer.rope)

        def run(step: Step) -> None:
            rotation = None if rope is None else step.rotations[rope]
            x = self._x[: step.n]
            heads = spec.attention_of(layer)
            y = attend_latent(x, attention, heads, latent, spec.norms, rotation, step.kv.layer(i))
            self._add(y if self.part is None else self.part.peers.sum(y), w.attention_out_norm)

        self._parts.append(run)

    def _mixture(self, moe: MoESpec, w: ExpertWeights, norm: Tensor | None) -> None:
        def run(step: Step) -> None:
            x, part = self._x[: step.n], self.part
            self._add(mixture(x, w, moe) if part is None else shared_mixture(x, w, moe, part), norm)

        self._parts.append(run)

    def _norm_heads(self, norm: QKNorm, qkv: Tensor, layer: LayerSpec, w: AttentionWeights) -> None:
        """Heads of a layer that are normed together, and lie on several ranks."""
        a, eps = self.spec.attention_of(layer), self.spec.norms.eps
        sizes = [a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim]

        def run(step: Step) -> None:
            q, k, _ = qkv[: step.n].split((*sizes, sizes[1]), dim=-1)
            normed = norm(q, k, w, a.head_dim, eps)
            q.copy_(normed[0])
            k.copy_(normed[1])

        self._parts.append(run)

    def _nothing(self, norm: Tensor | None) -> None:
        """Of a layer that only the rank's peers have heads or neurons of."""

        def run(step: Step) -> None:
            assert self.part is not None
            zeros = torch.zeros(step.n, self.spec.hidden_size)
            self._add(self.part.peers.sum(zeros), norm)

        self._parts.append(run)

    def _add(self, y: Tensor, norm: Tensor | None) -> None:
        y = y.float()
        if norm is not None:
            y = F.rms_norm(y, (y.shape[1],), norm.float(), self.spec.norms.eps)
        self._residual[: len(y)].add_(y, alpha=self.spec.residual_scale)


def can_run(spec: ModelSpec, dtype: torch.dtype) -> bool:
    """Whether the operations take the model's heads: of at most MAX_HEAD dimensions, in bfloat16 in pairs, and
    no state."""
    dim = spec.attention.head_dim
    if any(layer.mixer is not None for layer in spec.layers):
        return False
    return spec.attention.latent is not None or (dim <= MAX_HEAD and (dtype == torch.float32 or dim % 2 == 0))


def packed(matrix: Matrix) -> PackedLinear:
    assert isinstance(matrix, PackedLinear)
    return matrix


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
