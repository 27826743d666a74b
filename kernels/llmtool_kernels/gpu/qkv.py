"""From the fused projection to attention in one launch: norms of q and k, rotary embedding, KV into its pages."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmtool_kernels.attention import UNIT, AttentionBatch, KVLayout, store_rows
from llmtool_kernels.gpu.norm import rms_norm_reference
from llmtool_kernels.gpu.platform import load32, power_of_2, rounded, stored

HEADS = 8  # of a program, where each head is normed for itself
NORMS = {None: 0, "head": 1, "all": 2}


@triton.jit
def _turned(
    x, x_head, out, first, weight, cos, sin, eps, inverse_scale,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Heads first, ..., first + BLOCK - 1 of a token, x and out being those of its head 0. x's heads lie x_head
    apart, out's D.

    A head is two halves of HALF dimensions, which are turned against each other, and a rest that is not.
    """
    given: tl.constexpr = x.dtype.element_ty
    dtype: tl.constexpr = out.dtype.element_ty
    head = first + tl.arange(0, BLOCK)
    d = tl.arange(0, HALF_PAD)
    there = (head < HEADS)[:, None]
    inside = there if HALF_PAD == HALF else there & (d < HALF)[None, :]
    rows = x + (head * x_head)[:, None]
    a = load32(rows + d[None, :], inside)
    b = load32(rows + HALF + d[None, :], inside)
    rest = 2 * HALF + tl.arange(0, REST_PAD)
    in_rest = there & (rest < D)[None, :]
    if D > 2 * HALF:
        c = load32(rows + rest[None, :], in_rest)
    if NORM > 0:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if D > 2 * HALF:
            squares += tl.sum(c * c, 1)
        if NORM == 2:  # one vector of all heads
            scale = tl.rsqrt(tl.sum(squares, 0) / (HEADS * D) + eps)
            weights = weight + (head * D)[:, None]
        else:
            scale = tl.rsqrt(squares / D + eps)[:, None]
            weights = weight + (head * 0)[:, None]
        a = rounded(a * scale * load32(weights + d[None, :], inside), given)
        b = rounded(b * scale * load32(weights + HALF + d[None, :], inside), given)
        if D > 2 * HALF:
            c = c * scale * load32(weights + rest[None, :], in_rest)
    if ROTATE:
        cosine = tl.load(cos + d, mask=d < HALF, other=0.0)[None, :]
        sine = tl.load(sin + d, mask=d < HALF, other=0.0)[None, :]
        a, b = a * cosine - b * sine, b * cosine + a * sine
    to = out + (head * D)[:, None]
    tl.store(to + d[None, :], stored(a, inverse_scale, given, dtype), mask=inside)
    tl.store(to + HALF + d[None, :], stored(b, inverse_scale, given, dtype), mask=inside)
    if D > 2 * HALF:
        tl.store(to + rest[None, :], stored(c, inverse_scale, given, dtype), mask=in_rest)


@triton.jit
def qkv_kernel(
    q_out, q, k, v, arena, units, slots, q_weight, k_weight, cos, sin,
    q_row, q_head, k_row, k_head, v_row, v_head, layer_offset, v_offset, eps,
    k_inverse, v_inverse,
    UNIT: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, V_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (N, blocks of q heads, then of k, then of v). Strides and offsets in elements; cos, sin: [N, HALF].
    k_inverse, v_inverse: what float8 is multiplied by before it is stored."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + Q_BLOCK - 1) // Q_BLOCK
    K_BLOCKS: tl.constexpr = (KV_HEADS + K_BLOCK - 1) // K_BLOCK
    cos += token * HALF
    sin += token * HALF
    if block < Q_BLOCKS:
        _turned(
            q + token * q_row, q_head, q_out + token * (Q_HEADS * D), block * Q_BLOCK, q_weight, cos, sin, eps,
            1.0, Q_HEADS, Q_BLOCK, D, HALF, HALF_PAD, REST_PAD, NORM, ROTATE,
        )  # fmt: skip
    else:
        unit = tl.load(units + token)
        slot = tl.load(slots + token)
        if (unit >= 0) & (slot >= 0):
            page = arena + unit * UNIT
            if block < Q_BLOCKS + K_BLOCKS:
                to = page + layer_offset + slot * (KV_HEADS * D)
                _turned(
                    k + token * k_row, k_head, to, (block - Q_BLOCKS) * K_BLOCK, k_weight, cos, sin, eps,
                    k_inverse, KV_HEADS, K_BLOCK, D, HALF, HALF_PAD, REST_PAD, NORM, ROTATE,
                )  # fmt: skip
            else:
                head = (block - Q_BLOCKS - K_BLOCKS) * V_BLOCK + tl.arange(0, V_BLOCK)
                d = tl.arange(0, V_PAD)
                inside = (head < KV_HEADS)[:, None] & (d < DV)[None, :]
                values = tl.load(v + token * v_row + (head * v_head)[:, None] + d[None, :], mask=inside)
                to = page + v_offset + slot * (KV_HEADS * DV)
                if arena.dtype.element_ty.is_fp8():
                    values = stored(
                        values.to(tl.float32), v_inverse, v.dtype.element_ty, arena.dtype.element_ty
                    )
                tl.store(to + (head * DV)[:, None] + d[None, :], values, mask=inside)


def write_kv(k: Tensor, v: Tensor | None, arena: Tensor, layout: KVLayout, batch: AttentionBatch) -> None:
    """`llmtool_kernels.attention.write_kv`, but a token whose slot or unit is -1 writes nothing."""
    args, constants, grid = launch(None, k, v, arena, layout, batch)
    if len(k):
        qkv_kernel[grid](*args, **constants, num_warps=4)


def qkv_post(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    arena: Tensor,
    layout: KVLayout,
    batch: AttentionBatch,
    norm: str | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """q normed and turned, [N, Hq, D]; k, normed and turned, and v go to their tokens' pages and slots.

    q [N, Hq, D], k [N, Hkv, D], v [N, Hkv, Dv]: views whose last dimension is dense. v None: keys
    alone. norm "head": weights [D]; "all": [H * D], over all heads of a token. rotation: cos and sin,
    float32 [N, 1, R / 2]; dimensions i and i + R / 2 are a pair. A token whose slot or unit is -1 writes nothing.
    The reference is `qkv_post_reference`.
    """
    args, constants, grid = launch(q, k, v, arena, layout, batch, norm, q_weight, k_weight, eps, rotation)
    if len(k):
        qkv_kernel[grid](*args, **constants, num_warps=4)
    turned: Tensor = args[0]
    return turned


def launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    arena: Tensor,
    layout: KVLayout,
    batch: AttentionBatch,
    norm: str | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Any, ...], dict[str, object], tuple[int, int]]:
    """The kernel's arguments, of which the first is q's result, constants and grid. q None: KV alone is written."""
    n, kv_heads, dim = k.shape
    q_heads = 0 if q is None else q.shape[1]
    element = layout.element(k.dtype)
    pages = arena.view(element)
    start = layout.layer_offset // element.itemsize
    half = dim // 2 if rotation is None else rotation[0].shape[-1]
    cos, sin = (batch.token_slots, batch.token_slots) if rotation is None else rotation
    if rotation is not None:
        assert cos.is_contiguous() and sin.is_contiguous()
    assert all(t is None or t.stride(-1) == 1 for t in (q, k, v))
    together = norm == "all"
    q_block = power_of_2(q_heads) if together else min(HEADS, power_of_2(max(1, q_heads)))
    k_block = power_of_2(kv_heads) if together else min(HEADS, power_of_2(kv_heads))
    v_block = min(HEADS, power_of_2(kv_heads))
    v_dim = 0 if v is None else v.shape[2]
    q_view = k if q is None else q
    v_view = k if v is None else v
    args = (
        k if q is None else torch.empty(n, q_heads, dim, dtype=k.dtype, device=k.device),
        q_view, k, v_view, pages, batch.token_units, batch.token_slots,
        k if q_weight is None else q_weight, k if k_weight is None else k_weight, cos, sin,
        q_view.stride(0), q_view.stride(1), k.stride(0), k.stride(1), v_view.stride(0), v_view.stride(1),
        start, start + layout.tokens_per_page * kv_heads * dim, eps,
        1.0 / layout.k_scale, 1.0 / layout.v_scale,
    )  # fmt: skip
    constants: dict[str, object] = {
        "UNIT": UNIT // element.itemsize,
        "Q_HEADS": q_heads,
        "KV_HEADS": kv_heads,
        "D": dim,
        "DV": max(1, v_dim),
        "HALF": half,
        "HALF_PAD": power_of_2(half),
        "REST_PAD": power_of_2(max(1, dim - 2 * half)),
        "NORM": NORMS[norm],
        "ROTATE": rotation is not None,
        "Q_BLOCK": max(1, q_block),
        "K_BLOCK": k_block,
        "V_BLOCK": v_block,
        "V_PAD": power_of_2(max(1, v_dim)),
    }
    blocks = triton.cdiv(q_heads, max(1, q_block)) + triton.cdiv(kv_heads, k_block)
    if v is not None:
        blocks += triton.cdiv(kv_heads, v_block)
    return args, constants, (n, blocks)


def qkv_post_reference(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    arena: Tensor,
    layout: KVLayout,
    batch: AttentionBatch,
    norm: str | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    turned: list[Tensor | None] = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if x is None:
            turned.append(None)
            continue
        if norm is not None:
            assert weight is not None
            x = x if norm == "head" else x.flatten(1)
            x = rms_norm_reference(x, weight, eps).view(len(k), -1, k.shape[2])
        turned.append(x if rotation is None else _rotated(x, *rotation))
    written = (batch.token_units >= 0) & (batch.token_slots >= 0)
    units, slots = batch.token_units[written], batch.token_slots[written]
    keys = turned[1]
    assert keys is not None
    store_rows(keys[written], None if v is None else v[written], arena, layout, units, slots)
    return turned[0]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dim = 2 * cos.shape[-1]
    a, b = x[..., :dim].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., dim:]), dim=-1)
