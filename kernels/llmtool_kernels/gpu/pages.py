"""Copies of pages on the device: copy-on-write. The reference is `llmtool_kernels.attention.copy_pages`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmtool_kernels.attention import UNIT

BLOCK = 1024  # words of 8 bytes a program copies at a time
WORDS = tl.constexpr(UNIT // 8)


@triton.jit
def copy_kernel(dst, src, to, origin, page_words, BLOCK: tl.constexpr):
    """Grid (P, ceil(page_words / BLOCK)). to, origin: int64 [P], units in dst and src, which are int64."""
    pair = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < page_words
    words = tl.load(src + tl.load(origin + pair) * WORDS + d, mask=inside)
    tl.store(dst + tl.load(to + pair) * WORDS + d, words, mask=inside)


def copy_pages(
    arena_dst: Tensor, arena_src: Tensor, pairs: Sequence[tuple[int, int]], page_bytes: int
) -> None:
    """pairs: (source, destination) in units. As if all sources were read before any destination is written."""
    if not pairs:
        return
    index = torch.tensor(pairs, dtype=torch.int64).T.contiguous().to(arena_dst.device, non_blocking=True)
    origin, to = index
    dst, src = arena_dst.view(torch.int64), arena_src.view(torch.int64)
    words, units = page_bytes // 8, -(-page_bytes // UNIT)
    grid = (len(pairs), triton.cdiv(words, BLOCK))
    if arena_dst.data_ptr() == arena_src.data_ptr() and _overlap(pairs, units):
        between = torch.empty(len(pairs) * units * (UNIT // 8), dtype=torch.int64, device=dst.device)
        places = torch.arange(0, len(pairs) * units, units, device=dst.device)
        copy_kernel[grid](between, src, places, origin, words, BLOCK=BLOCK)
        src, origin = between, places
    copy_kernel[grid](dst, src, to, origin, words, BLOCK=BLOCK)


def _overlap(pairs: Sequence[tuple[int, int]], units: int) -> bool:
    """Whether a page is read that another copy writes."""
    sources, targets = np.array(pairs, np.int64).T
    targets = np.sort(targets)
    # The first target that ends after a source begins.
    at = np.searchsorted(targets, sources - units, side="right")
    nearest = targets[np.minimum(at, len(targets) - 1)]
    return bool(((at < len(targets)) & (nearest < sources + units)).any())
