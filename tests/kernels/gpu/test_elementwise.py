"""Norms, gates, what lies between projection and attention, and page copies, each against its torch reference."""

from __future__ import annotations

import pytest
import torch
from llmtool_kernels import attention
from llmtool_kernels.attention import UNIT
from llmtool_kernels.gpu.gate import KINDS, gated, gated_reference
from llmtool_kernels.gpu.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from llmtool_kernels.gpu.pages import copy_pages
from llmtool_kernels.gpu.qkv import qkv_post, qkv_post_reference, write_kv

from tests.kernels.gpu.pages import paged

HALF = {"atol": 2e-2, "rtol": 2e-2}


@pytest.mark.parametrize("size", [48, 130])
def test_rms_norm(device: torch.device, size: int) -> None:
    x = torch.randn(3, 2, size + 5, device=device)[..., :size]  # rows of a wider tensor
    weight = torch.rand(size, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    half = x.bfloat16()  # Gemma's weight stays in float32
    torch.testing.assert_close(rms_norm(half, weight, 1e-6), rms_norm_reference(half, weight, 1e-6), **HALF)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True), (False, False)])
def test_residual_addition_and_norm(device: torch.device, before: bool, after: bool, scale: float) -> None:
    hidden, x = torch.randn(3, 40, device=device), torch.randn(3, 40, device=device)
    inner = torch.rand(40, device=device) if before else None
    outer = torch.rand(40, device=device) if after else None
    kept = hidden.clone()
    ours = add_rms_norm(hidden, x, inner, outer, 1e-5, scale)
    expected = add_rms_norm_reference(hidden, x, inner, outer, 1e-5, scale)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(hidden, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gates(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(2, 2 * 1100, device=device)).to(dtype)
    close = {} if dtype == torch.float32 else HALF
    torch.testing.assert_close(gated(x, kind, 1.7, 2.0), gated_reference(x, kind, 1.7, 2.0), **close)


def rotation(n: int, half: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(n, 1, half, device=device) * 6
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("rotated", [0, 8, 16, 24])
@pytest.mark.parametrize("norm", [None, "head", "all"])
def test_norms_rotation_and_kv_write(device: torch.device, norm: str | None, rotated: int) -> None:
    """Heads of a fused projection, rotated in part (24 dimensions are no power of two) or not at all."""
    dim, q_heads, kv_heads = 24, 10, 3
    ours, theirs = (
        paged((1, 3), (6, 9), (q_heads, kv_heads), (dim, dim), padding=700, device=device) for _ in range(2)
    )
    theirs.arena.copy_(ours.arena)
    qkv = torch.randn(4, (q_heads + 2 * kv_heads) * dim, device=device)
    q, k, v = (
        t.unflatten(-1, (-1, dim)) for t in qkv.split((q_heads * dim, kv_heads * dim, kv_heads * dim), dim=-1)
    )
    heads = (1, 1) if norm == "head" else (q_heads, kv_heads)
    weights = [None if norm is None else torch.rand(h * dim, device=device) for h in heads]
    turn = rotation(4, rotated // 2, device) if rotated else None
    options = (norm, *weights, 1e-6, turn)
    got = qkv_post(q, k, v, ours.arena, ours.layout, ours.batch, *options)
    expected = qkv_post_reference(q, k, v, theirs.arena, theirs.layout, theirs.batch, *options)
    torch.testing.assert_close(got, expected)
    a, b = (arena.view(torch.float32) for arena in (ours.arena, theirs.arena))
    torch.testing.assert_close(a, b, equal_nan=True)


def test_kv_write_alone_equals_attentions_own(device: torch.device) -> None:
    """Keys and values of different widths, half precision; and keys alone, as latent attention has."""
    for dims in ((24, 8), (40, 0)):
        case = paged((2, 1), (6, 5), (3, 3), dims, dtype=torch.bfloat16, device=device)
        k = torch.randn_like(case.k)
        v = None if case.v is None else torch.randn_like(case.v)
        expected = case.arena.clone()
        attention.write_kv(k, v, expected, case.layout, case.batch)
        write_kv(k, v, case.arena, case.layout, case.batch)
        assert torch.equal(case.arena, expected)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_kv_in_eight_bits_is_scaled_clamped_and_rounded(device: torch.device, stored: torch.dtype) -> None:
    """Ties, numbers below the smallest normal, numbers past the largest, and NaN, which must not become one."""
    limit = torch.finfo(stored).max
    for dtype in (torch.float32, torch.bfloat16):
        case = paged(
            (8, 5), (9, 5), (3, 3), (24, 8), dtype=dtype, device=device, stored=stored, scales=(0.3, 4.0)
        )
        assert case.v is not None
        k, v = (
            torch.randn_like(x) * 2.0 ** torch.randint(-24, 20, x.shape, device=device)
            for x in (case.k, case.v)
        )
        # A number of the format, halfway to the next and past it, times the scale of values.
        v[0, 0, :4] = 4.0 * torch.tensor([17.0, 19.0, 18.1, -limit * 1.06], device=device)
        expected = case.arena.clone()
        attention.write_kv(k, v, expected, case.layout, case.batch)
        write_kv(k, v, case.arena, case.layout, case.batch)
        a, b = (arena.view(stored).float() for arena in (case.arena, expected))
        assert torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))  # but for the sign of 0
        k[1, 2, 3] = float("nan")
        before = case.arena.view(stored).float().isnan().sum()
        write_kv(k, v, case.arena, case.layout, case.batch)
        assert case.arena.view(stored).float().isnan().sum() == before + 1


@pytest.mark.parametrize("norm", [None, "head"])
def test_norms_rotation_and_kv_write_in_eight_bits(device: torch.device, norm: str | None) -> None:
    options = {"stored": torch.float8_e4m3fn, "scales": (0.6, 1.7), "device": device}
    ours = paged((1, 3), (6, 9), (4, 3), (24, 24), padding=700, **options)
    theirs = ours.arena.clone()
    q, k, v = (torch.randn(4, heads, 24, device=device) for heads in (4, 3, 3))
    weights = [None if norm is None else torch.rand(24, device=device) for _ in range(2)]
    more = (norm, *weights, 1e-6, rotation(4, 8, device))
    got = qkv_post(q, k, v, ours.arena, ours.layout, ours.batch, *more)
    want = qkv_post_reference(q, k, v, theirs, ours.layout, ours.batch, *more)
    torch.testing.assert_close(got, want)
    a, b = (arena.view(torch.float8_e4m3fn).float() for arena in (ours.arena, theirs))
    # A sum in another order may fall on the other side of a tie: then the next number is as near.
    torch.testing.assert_close(a, b, equal_nan=True, rtol=1 / 8, atol=2**-9)
    assert (a != b).sum() <= a.isnan().sum() + 4


def test_slot_minus_one_writes_nothing(device: torch.device) -> None:
    case = paged((3,), (5,), device=device)
    before = case.arena.clone()
    case.batch.token_slots[1] = -1
    case.batch.token_units[2] = -1
    expected = before.clone()
    k, v = torch.randn_like(case.k), torch.randn(3, 2, 16, device=device)
    qkv_post_reference(None, k, v, expected, case.layout, case.batch)
    write_kv(k, v, case.arena, case.layout, case.batch)
    assert torch.equal(case.arena, expected)
    changed = (case.arena != before).view(-1, 4).any(1).sum()
    assert changed == 2 * 2 * 16  # one token's k and v


@pytest.mark.parametrize("pairs", [[(0, 6), (3, 9)], [(0, 3), (3, 6), (6, 0)], [(0, 2)], []])
def test_page_copies(device: torch.device, pairs: list[tuple[int, int]]) -> None:
    """Chains and pages that overlap: all are read before any is written. A page is two units and a half."""
    page = 2 * UNIT + UNIT // 2
    arena = torch.randint(0, 256, (12 * UNIT,), dtype=torch.uint8, device=device)
    expected = arena.clone()
    attention.copy_pages(expected, expected, pairs, page)
    copy_pages(arena, arena, pairs, page)
    assert torch.equal(arena, expected)


def test_heads_may_lie_anywhere(device: torch.device) -> None:
    """As transformers hands them on: a head's tokens side by side."""
    case = paged((4,), (6,), (4, 2), (16, 8), device=device)
    q, k, v = (
        torch.randn(heads, 4, dim, device=device).transpose(0, 1) for heads, dim in ((4, 16), (2, 16), (2, 8))
    )
    expected = case.arena.clone()
    turn = rotation(4, 8, device)
    options = (None, None, None, 0.0, turn)
    want = qkv_post_reference(q, k, v, expected, case.layout, case.batch, *options)
    got = qkv_post(q, k, v, case.arena, case.layout, case.batch, *options)
    torch.testing.assert_close(got, want)
    a, b = (arena.view(torch.float32) for arena in (case.arena, expected))
    torch.testing.assert_close(a, b, equal_nan=True)
