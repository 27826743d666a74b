"""A list of operations that one call runs in order: what a step of a model is made of."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from llmtool_kernels.attention import AttentionBatch, KVLayout
from llmtool_kernels.cpu import abi
from llmtool_kernels.cpu.attention import arrangement, batch_struct
from llmtool_kernels.cpu.linear import PackedLinear
from llmtool_kernels.cpu.native import ELEMENTS, Native
from llmtool_kernels.cpu.weights import PackedWeight

QK_NORMS = {None: abi.QK_NORM_NONE, "head": abi.QK_NORM_HEAD, "all": abi.QK_NORM_ALL}


class Program:
    """Operations on buffers [rows, width] that outlive them; each runs on the first `num_tokens` rows of a step.

    Keys and values lie in pages as `arrangement` says: a layer's are all read and written by programs, or none.
    Widths and strides are read off the buffers, whose last dimension is dense. float32 buffers may stand wherever
    the model's own type does, but where a docstring says otherwise.
    """

    def __init__(self, native: Native) -> None:
        self._native = native
        self._ops: list[abi.Op] = []
        self._array: ctypes.Array[abi.Op] | None = None
        self._kept: list[object] = []  # what the operations point into

    def __len__(self) -> int:
        return len(self._ops)

    def embed(self, table: PackedWeight, scale: float, out: Tensor) -> None:
        """out (float32) = scale * the table's rows of the step's token ids."""
        op = self._append(abi.EMBED, table, out)
        op.embed = abi.Embed(table.struct, scale, out.data_ptr(), out.stride(0))

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, out: Tensor, add: float | None = None
    ) -> None:
        """out = x / rms(x) * weight (float32 [width]); without a weight, x itself, converted.

        add: out (float32) grows by so many times that instead.
        """
        op = self._append(abi.RMS_NORM, x, weight, out)
        op.rms_norm = abi.RmsNorm(
            x.data_ptr(),
            None if weight is None else weight.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            ELEMENTS[x.dtype],
            out.stride(0),
            ELEMENTS[out.dtype],
            x.shape[1],
            add is not None,
            eps,
            1.0 if add is None else add,
        )

    def linear(self, x: Tensor, linear: PackedLinear, out: Tensor, add: float | None = None) -> None:
        """out = x w^T + bias, its halves joined if the weight is gated. add: out (float32) grows by so many times
        that instead, which a gated weight cannot."""
        op = self._append(abi.LINEAR, x, linear, out)
        op.linear = linear.bound(x, out, add)

    def qkv_post(
        self,
        qkv: Tensor,
        q_out: Tensor,
        layout: KVLayout,
        batch: int,
        eps: float,
        qk_norm: str | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        rope: int | None = None,
    ) -> None:
        """Norm and rotate q and k of qkv [rows, q | k | v heads], k and v to their pages, q to q_out.

        batch, rope: numbers of the step's AttentionBatch and rotary table. q_out: of the pages' type.
        """
        op = self._append(abi.QKV_POST, qkv, q_out, q_norm, k_norm)
        heads = q_out.shape[1] // layout.k_head_dim
        op.qkv_post = abi.QkvPost(
            qkv.data_ptr(),
            q_out.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            qkv.stride(0),
            ELEMENTS[qkv.dtype],
            q_out.stride(0),
            ELEMENTS[q_out.dtype],
            heads,
            layout.num_kv_heads,
            layout.k_head_dim,
            layout.v_head_dim,
            layout.tokens_per_page,
            layout.layer_offset,
            batch,
            -1 if rope is None else rope,
            QK_NORMS[qk_norm],
            arrangement(layout),
            eps,
        )

    def attention(
        self,
        q: Tensor,
        out: Tensor,
        layout: KVLayout,
        batch: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """`llmtool_kernels.attention.paged_attention` without its writing. q, out: [rows, heads * dim] of the
        pages' type. sinks: float32."""
        op = self._append(abi.ATTENTION, q, out, sinks)
        op.attention = abi.Attention(
            q.data_ptr(),
            out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            q.stride(0),
            out.stride(0),
            ELEMENTS[q.dtype],
            q.shape[1] // layout.k_head_dim,
            layout.num_kv_heads,
            layout.k_head_dim,
            layout.v_head_dim,
            layout.tokens_per_page,
            layout.layer_offset,
            batch,
            window or 0,
            False,
            arrangement(layout),
            scale,
            softcap or 0.0,
        )

    def run(self, step: StepState) -> None:
        """One call into the library, which returns when the last operation is done."""
        if self._array is None:
            self._array = (abi.Op * len(self._ops))(*self._ops)
        self._native.run(self._array, step.struct)

    def profile(self, step: StepState) -> list[tuple[int, float]]:
        """Run the operations one call each: (kind, seconds) of every one, to see where a step's time goes."""
        return [(op.kind, self._native.timed((abi.Op * 1)(op), step.struct)) for op in self._ops]

    def _append(self, kind: int, *kept: object) -> abi.Op:
        op = abi.Op(kind, abi.ROWS_ALL)
        self._ops.append(op)
        self._kept.extend(kept)
        self._array = None
        return op


class StepState:
    """What the operations of one step read besides buffers and weights; it keeps alive what it points to.

    ropes: (cos, sin) float32 [num_tokens, ..., pairs] per rotary embedding.
    """

    def __init__(
        self,
        input_ids: Tensor,
        arena: Tensor,
        batches: Sequence[AttentionBatch],
        ropes: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        assert input_ids.dtype == torch.int64
        self._batches = (abi.Batch * len(batches))(*(batch_struct(batch, arena) for batch in batches))
        self._ropes = (abi.Rope * max(1, len(ropes)))(
            *(abi.Rope(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]) for cos, sin in ropes)
        )
        self._kept = (input_ids, arena, tuple(batches), tuple(ropes))
        self.struct = abi.Step(
            len(input_ids),
            input_ids.data_ptr(),
            ctypes.addressof(self._batches),
            ctypes.addressof(self._ropes),
        )
