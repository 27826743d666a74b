"""Paged attention on CPU; the reference beside it is
`llmtool_kernels.attention.paged_attention_reference`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from torch import Tensor

from llmtool_kernels.cpu import abi
from llmtool_kernels.cpu.native import ELEMENTS, Native, kernels, supports

if TYPE_CHECKING:
    from llmtool_kernels.attention import AttentionBatch, KVLayout


def batch_struct(batch: AttentionBatch, arena: Tensor) -> abi.Batch:
    """Borrows the batch's and the arena's memory."""
    return abi.Batch(
        len(batch.query_lens),
        batch.block_tables.stride(0),
        batch.query_start.data_ptr(),
        batch.seq_lens.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.token_units.data_ptr(),
        batch.token_slots.data_ptr(),
        None if batch.tree is None else batch.tree.data_ptr(),
        arena.data_ptr(),
    )


def arrangement(layout: KVLayout) -> int:
    """TILES, where the pages of a layer that only operations read and write can hold it so (csrc/page.h)."""
    tiles = layout.tokens_per_page % 16 == 0 and layout.v_head_dim % 32 == 0 and layout.v_head_dim > 0
    return abi.TILES if tiles and layout.k_head_dim % 2 == 0 else abi.ROWS


def kernels_for(q: Tensor, k: Tensor, v: Tensor | None) -> Native | None:
    """The kernels, if there are any and they take these: float32 or bfloat16, heads side by side, in pairs."""
    tensors = (q, k) if v is None else (q, k, v)
    dense = all(supports(t.dtype, t.device) and t.stride()[1:] == (t.shape[2], 1) for t in tensors)
    return kernels() if dense and q.shape[2] % 2 == 0 else None


def paged_attention_cpu(
    native: Native,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    arena: Tensor,
    layout: KVLayout,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """`llmtool_kernels.attention.paged_attention`, with its arguments and its result."""
    batch.check_window(window)
    value_dim = value_dim or layout.v_head_dim
    out = q.new_empty(q.shape[0], q.shape[1], value_dim)
    element, rows = ELEMENTS[q.dtype], q.shape[0]
    sinks = None if sinks is None else sinks.float()
    ops = (abi.Op * 2)()
    ops[0].kind, ops[0].rows = abi.WRITE_KV, rows
    ops[0].write_kv = abi.WriteKv(
        k.data_ptr(),
        None if v is None else v.data_ptr(),
        k.stride(0),
        0 if v is None else v.stride(0),
        element,
        layout.num_kv_heads,
        layout.k_head_dim,
        layout.v_head_dim,
        layout.tokens_per_page,
        layout.layer_offset,
        0,
    )
    ops[1].kind, ops[1].rows = abi.ATTENTION, rows
    ops[1].attention = abi.Attention(
        q.data_ptr(),
        out.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        q.stride(0),
        out.stride(0),
        element,
        q.shape[1],
        layout.num_kv_heads,
        layout.k_head_dim,
        value_dim,
        layout.tokens_per_page,
        layout.layer_offset,
        0,
        window or 0,
        v is None,
        abi.ROWS,
        scale,
        softcap or 0.0,
    )
    batches = batch_struct(batch, arena)
    step = abi.Step(rows, None, ctypes.addressof(batches), None)
    native.run(ops, step)
    return out
