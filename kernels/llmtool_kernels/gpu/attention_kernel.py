"""The one attention kernel: decode, verification and prompt chunks over paged KV.

Online softmax in base 2 (FlashAttention-2, arXiv 2307.08691). The query heads of a KV head's group are rows of one
matrix, so that decoding runs on tensor cores and reads each key and value once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmtool_kernels.gpu.platform import WIDEN, wide

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(pointers, mask):
    """tl.load, None meaning all; in float32 where the kernel is interpreted."""
    if mask is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0.0)
    if WIDEN:
        x = wide(x)
    return x


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _visible(n, position, bits, context, window, end, WINDOW: tl.constexpr, TREE: tl.constexpr):
    """[M, N]: which tokens n [N] the rows at `position` [M] see; of a tree's new ones those in their bits [M]."""
    if TREE:
        new = n - context
        chosen = (bits[:, None] >> tl.minimum(tl.maximum(new, 0), 63)[None, :].to(tl.int64)) & 1
        seen = ((new < 0)[None, :] | (chosen != 0)) & (n < end)[None, :]
    else:
        seen = n[None, :] <= position[:, None]
    if WINDOW:
        seen = seen & (n[None, :] > position[:, None] - window)
    return seen


@triton.jit
def _blocks(
    begin, end, last, q1, q2, acc, m, total,
    k_base, v_base, table, position, bits, context, window, scale, softcap,
    MASKED: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TREE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens begin, ..., end - 1 joined to a tile's running sums. last: the last token there is to load."""
    d1 = tl.arange(0, D1)
    dv = tl.arange(0, DV_PAD)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # Past the end the last token is read again: written memory, whose scores are masked.
        at = tl.minimum(n, last)
        page = at // PAGE
        slot = at - page * PAGE
        base = tl.load(table + page).to(tl.int64) * UNIT  # [N]
        k_rows = k_base + (base + slot * K_STRIDE)[:, None]
        k1 = _load(k_rows + d1[None, :], None if D1 <= DK else (d1 < DK)[None, :]).to(q1.dtype)  # [N, D1]
        s = _dot(q1, tl.trans(k1), None, PRECISION)  # [M, N]
        if D2 > 0:
            d2 = D1 + tl.arange(0, D2)
            k2 = _load(k_rows + d2[None, :], None if D1 + D2 <= DK else (d2 < DK)[None, :]).to(q1.dtype)
            s = _dot(q2, tl.trans(k2), s, PRECISION)
        if SOFTCAP:
            # softcap * tanh(s * scale / softcap), in base 2.
            t = tl.exp2(s * (2.0 * LOG2E * scale / softcap))
            s = (softcap * LOG2E) * (1.0 - 2.0 / (t + 1.0))
        else:
            s = s * (scale * LOG2E)
        if MASKED:
            s = tl.where(
                _visible(n, position, bits, context, window, last + 1, WINDOW, TREE), s, float("-inf")
            )
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that sees none of these tokens, nor any before, has no maximum to subtract.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - shift)
        p = tl.exp2(s - shift[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if SHARED:  # values are the leading dimensions of the keys just read
            v = k1
        else:
            v_rows = v_base + (base + slot * V_STRIDE)[:, None]
            v = _load(v_rows + dv[None, :], None if DV_PAD <= DV else (dv < DV)[None, :]).to(
                q1.dtype
            )  # [N, DV]
        acc = _dot(p.to(v.dtype), v, acc, PRECISION)
        m = m_new
    return acc, m, total


@triton.jit
def _with_sink(m, total, sink, SINKS: tl.constexpr):
    """(what sums weigh, their length) after the sinks [M] at these addresses took their share; m, total: [M]."""
    share = tl.full(m.shape, 1.0, tl.float32)
    if SINKS:
        s = _load(sink, None).to(tl.float32) * LOG2E
        top = tl.maximum(m, s)
        share = tl.exp2(m - top)
        total = total * share + tl.exp2(s - top)
    return share, total


@triton.jit
def _combine(
    out_rows, partial_acc, partial_ml, sink, valid, first, last, sum_scale,
    DV: tl.constexpr, DV_PAD: tl.constexpr, SINKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write a tile's output from its partial results, slots first, ..., last - 1.

    In their order, whoever came last: the same sum on every run. Some columns at a time, because the tile's own
    sums are in registers still; four slots at a time, because each load takes long and few are to be had.
    """
    r = tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for slot in range(first, last):
        m = tl.maximum(m, tl.load(partial_ml + slot * (2 * BLOCK_M) + r, cache_modifier=".cg"))
    m = tl.where(m == float("-inf"), 0.0, m)  # of a row that is none
    total = tl.zeros([BLOCK_M], tl.float32)
    for slot in range(first, last):
        ml = partial_ml + slot * (2 * BLOCK_M) + r
        weight = tl.exp2(tl.load(ml, cache_modifier=".cg") - m)
        total += weight * tl.load(ml + BLOCK_M, cache_modifier=".cg")
    share, total = _with_sink(m, total, sink, SINKS)
    scale = share / total * sum_scale
    COLUMNS: tl.constexpr = DV_PAD if DV_PAD < 64 else 64
    for c in tl.static_range(0, DV_PAD, COLUMNS):
        columns = c + tl.arange(0, COLUMNS)
        stored = valid[:, None] & (columns < DV)[None, :]
        cells = r[:, None] * DV + columns[None, :]
        acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
        for four in range(first, last, 4):
            for i in tl.static_range(4):
                slot = tl.minimum(four + i, last - 1)
                m_part = tl.load(partial_ml + slot * (2 * BLOCK_M) + r, cache_modifier=".cg")
                weight = tl.where(four + i < last, tl.exp2(m_part - m), 0.0)
                part = partial_acc + slot * (BLOCK_M * DV) + cells
                acc += weight[:, None] * tl.load(part, mask=stored, other=0.0, cache_modifier=".cg")
        o = acc * scale[:, None]
        tl.store(out_rows + columns[None, :], o.to(out_rows.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["table_stride", "window"])
def attention_kernel(
    out, q, arena, tables, starts, segments, counters, partial_acc, partial_ml, sinks, tree,
    q_row, q_head, v_offset, table_stride, layer_offset, window, scale, softcap, sum_scale,
    UNIT: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr, V_HEAD: tl.constexpr, DK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, TREE: tl.constexpr, PHASES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (P,): program p runs its segments (`plan.py`). All strides and offsets are in elements.

    out [N, Hq, DV], q [N, Hq, DK] of strides q_row, q_head; tables [S, table_stride]. partial_acc [slots, M, DV]
    and partial_ml [slots, 2, M] are float32. counters are zero before and after. sum_scale: of all stored values;
    that of the keys is in scale.
    """
    program = tl.program_id(0)
    d1 = tl.arange(0, D1)
    dv = tl.arange(0, DV_PAD)
    r = tl.arange(0, BLOCK_M)
    for segment in range(tl.load(starts + program), tl.load(starts + program + 1)):
        fields = segments + segment * WIDTH
        sequence = tl.load(fields)
        kv_head = tl.load(fields + 1)
        query_start = tl.load(fields + 2)
        context = tl.load(fields + 3)
        num_rows = tl.load(fields + 4)
        first_row = tl.load(fields + 5)
        begin = tl.load(fields + 6)
        end = tl.load(fields + 7)
        slot = tl.load(fields + 8)

        row = first_row + r
        valid = row < num_rows
        row = tl.minimum(row, num_rows - 1)
        query = row // GROUP
        head = kv_head * GROUP + row % GROUP
        q_rows = q + ((query_start + query).to(tl.int64) * q_row + head * q_head)[:, None]
        q1 = _load(q_rows + d1[None, :], None if D1 <= DK else (d1 < DK)[None, :])
        q2 = q1
        if D2 > 0:
            d2 = D1 + tl.arange(0, D2)
            q2 = _load(q_rows + d2[None, :], None if D1 + D2 <= DK else (d2 < DK)[None, :])
        position = context + query
        bits = position
        if TREE:
            bits = tl.load(tree + query_start + query)
            if WINDOW:  # a node's position is its depth: it sees itself and its ancestors
                seen = tl.zeros([BLOCK_M], tl.int32)
                for j in range(num_rows // GROUP):
                    seen += ((bits >> j) & 1).to(tl.int32)
                position = context + seen - 1

        k_base = arena + layer_offset + kv_head * DK
        v_base = arena + v_offset + kv_head * V_HEAD
        table = tables + sequence.to(tl.int64) * table_stride
        acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if PHASES:
            # Blocks that every row of the tile sees in full lie between those that need a mask.
            first = context + first_row // GROUP  # position of the tile's first query
            low = begin
            if WINDOW:
                final = context + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // GROUP
                low = begin + tl.maximum(0, final - window + 1 - begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
                low = tl.minimum(low, end)
            whole = context if TREE else first + 1  # tokens that all rows see
            high = low + tl.maximum(0, tl.minimum(whole, end) - low) // BLOCK_N * BLOCK_N
            if WINDOW:
                acc, m, total = _blocks(
                    begin, low, end - 1, q1, q2, acc, m, total,
                    k_base, v_base, table, position, bits, context, window, scale, softcap,
                    True, UNIT, PAGE, K_STRIDE, V_STRIDE, DK, D1, D2, DV, DV_PAD,
                    SHARED, WINDOW, SOFTCAP, TREE, PRECISION, BLOCK_N,
                )  # fmt: skip
            acc, m, total = _blocks(
                low, high, end - 1, q1, q2, acc, m, total,
                k_base, v_base, table, position, bits, context, window, scale, softcap,
                False, UNIT, PAGE, K_STRIDE, V_STRIDE, DK, D1, D2, DV, DV_PAD,
                SHARED, WINDOW, SOFTCAP, TREE, PRECISION, BLOCK_N,
            )  # fmt: skip
        else:
            high = begin
        acc, m, total = _blocks(
            high, end, end - 1, q1, q2, acc, m, total,
            k_base, v_base, table, position, bits, context, window, scale, softcap,
            True, UNIT, PAGE, K_STRIDE, V_STRIDE, DK, D1, D2, DV, DV_PAD,
            SHARED, WINDOW, SOFTCAP, TREE, PRECISION, BLOCK_N,
        )  # fmt: skip

        stored = valid[:, None] & (dv < DV)[None, :]
        out_rows = (out + (query_start + query).to(tl.int64) * (KV_HEADS * GROUP * DV) + head * DV)[:, None]
        if slot < 0:
            share, total = _with_sink(m, total, sinks + head, SINKS)
            o = acc * (share / total * sum_scale)[:, None]
            tl.store(out_rows + dv[None, :], o.to(out.dtype.element_ty), mask=stored)
        else:
            num_slots = tl.load(fields + 10)
            counter = counters + tl.load(fields + 11)
            tl.store(partial_acc + slot * (BLOCK_M * DV) + r[:, None] * DV + dv[None, :], acc, mask=stored)
            tl.store(partial_ml + slot * (2 * BLOCK_M) + r, m)
            tl.store(partial_ml + slot * (2 * BLOCK_M) + BLOCK_M + r, total)
            # All threads' partial results are written before the count says so, and read after it did.
            tl.debug_barrier()
            arrived = tl.atomic_add(counter, 1, sem="acq_rel")
            tl.debug_barrier()
            if arrived == num_slots - 1:
                tl.store(counter, 0)
                first_slot = tl.load(fields + 9)
                _combine(
                    out_rows, partial_acc, partial_ml, sinks + head, valid, first_slot, first_slot + num_slots,
                    sum_scale, DV, DV_PAD, SINKS, BLOCK_M,
                )  # fmt: skip
