"""Paged attention, and in torch the reference of every faster kernel.

On CUDA tensors these functions hand over to `llmtool_kernels.gpu`, which is not imported before.

The KV arena is one flat uint8 tensor. A block-table entry is an offset into it in units of `UNIT` bytes, so
that pages of different sizes share it. Inside a page a layer starts at `KVLayout.layer_offset` bytes and
stores K of all slots, then V of all slots: K[slot, head, dim], V[slot, head, dim].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtool_kernels import dispatch
from llmtool_kernels.attention_plan import AttentionWork, plan_step
from llmtool_kernels.float8 import decode, encode

MAX_SCORES = 2**22  # attention scores held at a time, where they are held at all
UNIT = 512  # bytes; the same number as llmtool.core.memory.geometry.UNIT, which kernels must not import


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Where one layer's KV lies inside a page. layer_offset: bytes from the start of the page.

    v_head_dim 0: nothing is stored for V, whose rows are the leading dimensions of K's (latent attention).
    dtype: torch.float8_e4m3fn or float8_e5m2 (`llmtool_kernels.float8`); None stores elements as they come.
    k_scale, v_scale: of float8, what a stored element is multiplied by to be what was written.
    """

    layer_offset: int
    tokens_per_page: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: torch.dtype | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def element(self, given: torch.dtype) -> torch.dtype:
        """The type of stored elements where keys come as `given`."""
        return self.dtype or given

    @property
    def sum_scale(self) -> float:
        """What a sum over stored values is multiplied by."""
        return self.v_scale if self.v_head_dim else self.k_scale


@dataclass(slots=True)
class AttentionBatch:
    """One step's sequences in one KV group: S sequences, N new tokens in all, in the order of the sequences.

    query_start: int32 [S+1], sequence s owns rows query_start[s]:query_start[s+1] of q.
    seq_lens: int32 [S], tokens of each sequence including this step's.
    block_tables: int32 [S, W], page offsets in units; entries past a sequence's pages are never read.
    token_units, token_slots: int64 [N], page offset and slot that take each new token's KV.
    query_lens, kv_lens: the same lengths on the host, so that planning a step never waits for a device.
    tree: int64 [N], for sequences of at most 64 new tokens: bit j of a token's word says that it sees its
    sequence's j-th new token (itself and its ancestors in a tree of drafts, whose depth is then its position;
    all of the tokens before them it sees anyway). None: a token sees those before it.
    tree_depth: nodes of the longest branch, 0 without a tree, on the host. A layer's window must be as long.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    token_units: Tensor
    token_slots: Tensor
    query_lens: Sequence[int]
    kv_lens: Sequence[int]
    tree: Tensor | None = None
    tree_depth: int = 0
    # The step's work, made by the first layer that asks and shared by all layers alike in what is its key.
    _plans: dict[tuple[Any, ...], list[Any]] = field(default_factory=dict, init=False)
    _scratch: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        tokens_per_page: int,
        device: torch.device | str = "cpu",
        tree: Sequence[int] | None = None,
    ) -> AttentionBatch:
        """The batch where the last query_lens[s] of kv_lens[s] tokens are new; tables in units."""
        width = max((len(table) for table in tables), default=0)
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        block_tables = torch.tensor(padded, dtype=torch.int32).view(len(tables), width)
        units, slots = [], []
        for n, total, table in zip(query_lens, kv_lens, tables, strict=True):
            units += [table[p // tokens_per_page] for p in range(total - n, total)]
            slots += [p % tokens_per_page for p in range(total - n, total)]
        return cls(
            query_start=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
            seq_lens=torch.tensor(list(kv_lens), dtype=torch.int32, device=device),
            block_tables=block_tables.to(device),
            token_units=torch.tensor(units, dtype=torch.int64, device=device),
            token_slots=torch.tensor(slots, dtype=torch.int64, device=device),
            query_lens=query_lens,
            kv_lens=kv_lens,
            tree=None if tree is None else torch.tensor(tree, dtype=torch.int64, device=device),
            tree_depth=0 if tree is None else max((bits % 2**64).bit_count() for bits in tree),
        )

    def __post_init__(self) -> None:
        assert (self.tree is None) == (self.tree_depth == 0), "a tree comes with its depth"

    def check_window(self, window: int | None) -> None:
        """For whoever plans a layer with this window, which is counted from a node's depth back in rows: a tree's
        rows lie beside each other, so of a longer branch it would hide the wrong ones."""
        assert window is None or window >= self.tree_depth, (
            f"a window of {window} tokens is shorter than a branch of {self.tree_depth} drafts"
        )

    def scratch(self, slot: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Memory [rows, width] to gather into, the same for all layers of the step.

        Fresh memory costs a CPU a page fault every 4 KiB, which takes longer than the copy itself.
        """
        memory = self._scratch.get((slot, dtype))
        if memory is None or memory.numel() < rows * width:
            memory = torch.empty(rows * width, dtype=dtype, device=self.block_tables.device)
            self._scratch[slot, dtype] = memory
        return memory[: rows * width].view(rows, width)

    def work(self, window: int | None, tokens_per_page: int, dtype: torch.dtype) -> list[AttentionWork]:
        """What `paged_attention` runs for this step; dtype is that of the additive masks."""
        self.check_window(window)
        key = (window, tokens_per_page, dtype)
        if key not in self._plans:
            self._plans[key] = plan_step(
                self.query_lens, self.kv_lens, self.block_tables, window, tokens_per_page, dtype, self.tree
            )
        return self._plans[key]


def paged_attention(
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
    """Causal attention of a step's new tokens over their sequences' paged KV, the new KV included.

    q: [N, Hq, Dk], k: [N, Hkv, Dk], v: [N, Hkv, Dv] of one dtype, the cache's unless the layout names another; Hq
    is a multiple of Hkv.
    window: a token sees itself and the window - 1 tokens before it; None sees all. softcap: scores become
    softcap * tanh(scores / softcap). sinks [Hq]: a score per head that takes its share of the softmax and adds
    nothing. v None: the values are the first value_dim dimensions of the cached keys. Returns [N, Hq, Dv].
    All new KV is written before any is read: a sequence may read pages that another fills in this step.
    """
    if dispatch.on_gpu(q):
        from llmtool_kernels.gpu.attention import read_pages, runs
        from llmtool_kernels.gpu.qkv import write_kv as write_kv_on_device

        if runs(q, layout):
            write_kv_on_device(k, v, arena, layout, batch)
            shared = value_dim if v is None else None
            return read_pages(q, arena, layout, batch, scale, window, softcap, sinks, shared)
    if q.device.type == "cpu" and layout.dtype is None:
        from llmtool_kernels.cpu.attention import kernels_for, paged_attention_cpu  # which import this module

        native = kernels_for(q, k, v)
        if native is not None:
            return paged_attention_cpu(
                native, q, k, v, arena, layout, batch, scale, window, softcap, sinks, value_dim
            )
    return paged_attention_reference(q, k, v, arena, layout, batch, scale, window, softcap, sinks, value_dim)


def paged_attention_reference(
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
    """`paged_attention` by gathering pages into dense tensors; on any device."""
    write_kv(k, v, arena, layout, batch)
    value_dim = value_dim or layout.v_head_dim
    k_pages, v_pages = page_rows(arena, layout, k.dtype)
    scale *= layout.k_scale
    out = q.new_empty(q.shape[0], q.shape[1], value_dim)
    for work in batch.work(window, layout.tokens_per_page, q.dtype):
        keys = _gather(k_pages, work, layout, batch, slot=0, dtype=q.dtype)  # [s, L, Hkv, Dk]
        if v is None:
            values = keys[..., :value_dim]
        else:
            values = _gather(v_pages, work, layout, batch, slot=1, dtype=q.dtype)  # [s, L, Hkv, Dv]
        if softcap is None and sinks is None:
            out[work.rows] = _attend(q[work.rows], keys, values, work, scale)
        else:
            out[work.rows] = _attend_modified(q[work.rows], keys, values, work, scale, softcap, sinks)
    return out if layout.sum_scale == 1.0 else out * layout.sum_scale


def write_kv(k: Tensor, v: Tensor | None, arena: Tensor, layout: KVLayout, batch: AttentionBatch) -> None:
    """Store the new tokens' k [N, Hkv, Dk] and v [N, Hkv, Dv] at their pages and slots."""
    store_rows(k, v, arena, layout, batch.token_units, batch.token_slots)


def store_rows(
    k: Tensor, v: Tensor | None, arena: Tensor, layout: KVLayout, units: Tensor, slots: Tensor
) -> None:
    """Store k [N, Hkv, Dk] and v [N, Hkv, Dv] at these pages' units and slots, int64 [N] each."""
    scales = (layout.k_scale, layout.v_scale)
    for new, pages, scale in zip((k, v), page_rows(arena, layout, k.dtype), scales, strict=True):
        if new is not None:
            rows = pages.unflatten(1, (layout.tokens_per_page, -1))  # [U, slot, Hkv * D]
            stored = new if layout.dtype is None else encode(new, layout.dtype, scale)
            rows[units, slots] = stored.flatten(1)


def move_tokens(
    arena: Tensor,
    layout: KVLayout,
    dtype: torch.dtype,
    tiles: bool,
    from_units: Tensor,
    from_slots: Tensor,
    to_units: Tensor,
    to_slots: Tensor,
) -> None:
    """Copy keys and values of tokens to other places, units and slots int64 [N]; reading comes before writing.

    dtype: of stored elements. tiles: the layer lies as the CPU's operations read it (cpu/csrc/page.h).
    """
    k_pages, v_pages = page_rows(arena, layout, dtype)
    if not tiles:
        for pages in (k_pages, v_pages) if layout.v_head_dim else (k_pages,):
            rows = pages.unflatten(1, (layout.tokens_per_page, -1))  # [U, slot, Hkv * D]
            rows[to_units, to_slots] = rows[from_units, from_slots]
        return
    pair, heads = 4 // dtype.itemsize, layout.num_kv_heads
    keys = k_pages.unflatten(
        1, (heads, -1, layout.k_head_dim // pair, 16, pair)
    )  # [U, Hkv, T / 16, D / 2, 16, 2]
    keys[to_units, :, to_slots // 16, :, to_slots % 16] = keys[
        from_units, :, from_slots // 16, :, from_slots % 16
    ]
    values = v_pages.unflatten(1, (heads, -1, layout.v_head_dim, pair))  # [U, Hkv, T / 2, D, 2]
    to, start = (
        (to_units, to_slots // pair, to_slots % pair),
        (from_units, from_slots // pair, from_slots % pair),
    )
    values[to[0], :, to[1], :, to[2]] = values[start[0], :, start[1], :, start[2]]


def page_rows(arena: Tensor, layout: KVLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One layer's K [U, T * Hkv * Dk] and V [U, T * Hkv * Dv], row u being what a page at unit u would hold.

    Rows overlap: their stride is a unit, not a page. Only rows that lie inside the arena exist. dtype: of keys as
    they come; elements of another type of the layout's are bytes here.
    """
    if layout.dtype is not None:
        dtype = torch.uint8
    elements = arena.view(dtype)
    unit = UNIT // dtype.itemsize
    per_head = layout.tokens_per_page * layout.num_kv_heads
    k_width, v_width = per_head * layout.k_head_dim, per_head * layout.v_head_dim
    start = layout.layer_offset // dtype.itemsize
    units = (elements.numel() - start - k_width - v_width) // unit + 1
    return (
        elements.as_strided((units, k_width), (unit, 1), start),
        elements.as_strided((units, v_width), (unit, 1), start + k_width),
    )


def copy_pages(
    arena_dst: Tensor, arena_src: Tensor, pairs: Sequence[tuple[int, int]], page_bytes: int
) -> None:
    """Copy pages between arenas, or inside one: copy-on-write, swap. pairs: (source, destination) in units.

    Sources are read before any destination is written, as if all copies happened at once.
    """
    if not pairs:
        return
    if dispatch.on_gpu(arena_dst) and dispatch.on_gpu(arena_src):
        from llmtool_kernels.gpu.pages import copy_pages as copy_on_device

        copy_on_device(arena_dst, arena_src, pairs, page_bytes)
        return
    index = torch.tensor(pairs, dtype=torch.int64).T  # [2, P]
    src, dst = (_page_words(arena, page_bytes) for arena in (arena_src, arena_dst))
    pages = src.index_select(0, index[0].to(src.device))
    dst[index[1].to(dst.device)] = pages.to(dst.device)


def _page_words(arena: Tensor, page_bytes: int) -> Tensor:
    """int64 [U, page_bytes / 8], row u being the page at unit u: eight bytes at a time copy fastest."""
    words = arena.view(torch.int64)
    unit, width = UNIT // 8, page_bytes // 8
    return words.as_strided(((words.numel() - width) // unit + 1, width), (unit, 1))


def _gather(
    pages: Tensor, work: AttentionWork, layout: KVLayout, batch: AttentionBatch, slot: int, dtype: torch.dtype
) -> Tensor:
    """[s, L, Hkv, D] of the pages a piece of work reads, in the batch's scratch memory, or widened to dtype."""
    rows = batch.scratch(slot, work.units.numel(), pages.shape[1], pages.dtype)
    torch.index_select(pages, 0, work.units.view(-1), out=rows)
    if layout.dtype is not None:
        rows = decode(rows, layout.dtype, dtype)
    kv = rows.view(work.num_seqs, work.padded_len, layout.num_kv_heads, -1)[:, : work.length]
    if work.stale is not None:
        # Slots no token of this sequence wrote may hold NaN, which no additive mask hides.
        kv[work.stale] = 0
    return kv


def _attend(q: Tensor, keys: Tensor, values: Tensor, work: AttentionWork, scale: float) -> Tensor:
    """q [R, Hq, Dk] over keys [s, L, Hkv, Dk] -> [R, Hq, Dv]; R = s (a query each) or s = 1 (a chunk of R).

    K and V are never repeated for the query heads of a group: for single queries the group's heads become
    query rows, for a chunk they become a batch over which K and V are broadcast.
    """
    num_kv_heads = keys.shape[2]
    grouped = q.unflatten(1, (num_kv_heads, -1))  # [R, Hkv, G, Dk]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [s, Hkv, L, D]
    if not work.chunk:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=work.mask, scale=scale)
        return out.flatten(1, 2)
    group = grouped.shape[2]
    out = F.scaled_dot_product_attention(
        grouped.permute(2, 1, 0, 3),  # [G, Hkv, R, Dk]
        keys.expand(group, -1, -1, -1),
        values.expand(group, -1, -1, -1),
        attn_mask=work.mask,
        is_causal=work.causal,
        scale=scale,
    )
    return out.permute(2, 1, 0, 3).flatten(1, 2)


def _attend_modified(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    work: AttentionWork,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with what scaled_dot_product_attention lacks, soft-capped scores and sinks.

    The scores are then in memory, in float32, and so for at most MAX_SCORES of them at a time.
    """
    num_kv_heads = keys.shape[2]
    keys = keys.permute(0, 2, 3, 1).float()  # [s, Hkv, Dk, L]
    values = values.transpose(1, 2).float()  # [s, Hkv, L, Dv]
    at_once = max(1, MAX_SCORES // (q.shape[1] * work.length)) if work.chunk else len(q)
    out = []
    for start in range(0, len(q), at_once):
        rows = q[start : start + at_once].unflatten(1, (num_kv_heads, -1)).float()  # [R, Hkv, G, Dk]
        # A query per sequence: its group's heads are the rows; a chunk: all its queries' too.
        rows = rows[:, :, :, None] if not work.chunk else rows.permute(1, 2, 0, 3)[None]  # [s, Hkv, G, R, Dk]
        group, count = rows.shape[2:4]
        scores = (rows.flatten(2, 3) @ keys * scale).unflatten(2, (group, count))  # [s, Hkv, G, R, L]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        mask = _mask_of_rows(work, start, count, q.device)
        if mask is not None:
            scores = scores + mask
        if sinks is not None:
            sink = sinks.float().view(1, num_kv_heads, group, 1, 1).expand(len(scores), -1, -1, count, -1)
            weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        part = (weights.flatten(2, 3) @ values).unflatten(2, (group, count))  # [s, Hkv, G, R, Dv]
        out.append(part[:, :, :, 0] if not work.chunk else part[0].permute(2, 0, 1, 3))
    return torch.cat(out).flatten(1, 2).to(q.dtype)


def _mask_of_rows(work: AttentionWork, start: int, count: int, device: torch.device) -> Tensor | None:
    """The additive mask of some of a chunk's rows [R, L], or of single queries [s, 1, 1, 1, L]."""
    if not work.chunk:
        return None if work.mask is None else work.mask[:, :, None]
    if work.mask is not None:
        return work.mask[start : start + count]
    assert work.causal
    hidden = torch.ones(count, work.length, dtype=torch.bool, device=device).triu_(start + 1)
    return torch.zeros(count, work.length, device=device).masked_fill_(hidden, float("-inf"))
