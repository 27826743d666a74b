"""Sequences with random KV in scattered pages of an arena that is NaN wherever nothing was written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llmtool_kernels.attention import UNIT, AttentionBatch, KVLayout, write_kv

NEVER_READ = 2**30  # in tables past a sequence's pages, and before its window: far outside any arena


@dataclass(frozen=True, slots=True)
class Paged:
    """q [N, Hq, Dk] and the new tokens' k, v of a step, over an arena that holds all KV already."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    arena: torch.Tensor
    layout: KVLayout
    batch: AttentionBatch


def paged(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    tokens_per_page: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    window: int | None = None,
    tree: Sequence[int] | None = None,
    padding: int = 0,
    offset: int = UNIT,
    stored: torch.dtype | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Paged:
    """heads: of queries and KV. dims: of k and v, the latter 0 for values inside the keys. tree: AttentionBatch's.
    stored, scales: KVLayout's dtype, k_scale and v_scale.

    padding: bytes between pages, as other layers and page sizes leave; offset: of the layer in a page, bytes.
    """
    q_heads, kv_heads = heads
    layout = KVLayout(offset, tokens_per_page, kv_heads, *dims, stored, *scales)
    page_bytes = offset + tokens_per_page * kv_heads * sum(dims) * layout.element(dtype).itemsize + padding
    units = -(-page_bytes // UNIT)
    counts = [-(-length // tokens_per_page) for length in kv_lens]
    order = random.Random(0).sample(range(sum(counts)), sum(counts))
    tables = [[order.pop() * units for _ in range(count)] for count in counts]
    arena = torch.full((sum(counts) * units * UNIT,), 0xFF, dtype=torch.uint8, device=device)
    everything = AttentionBatch.build(kv_lens, kv_lens, tables, tokens_per_page, device)
    k = torch.randn(sum(kv_lens), kv_heads, dims[0], device=device).to(dtype)
    v = torch.randn(sum(kv_lens), kv_heads, dims[1], device=device).to(dtype) if dims[1] else None
    write_kv(k, v, arena, layout, everything)
    batch = AttentionBatch.build(query_lens, kv_lens, tables, tokens_per_page, device, tree)
    for row, (n, length) in enumerate(zip(query_lens, kv_lens, strict=True)):
        batch.block_tables[row, counts[row] :] = NEVER_READ
        if window is not None:
            batch.block_tables[row, : max(0, length - n + 1 - window) // tokens_per_page] = NEVER_READ
    ends = torch.tensor(kv_lens).cumsum(0).tolist()
    new = [i for end, n in zip(ends, query_lens, strict=True) for i in range(end - n, end)]
    q = torch.randn(sum(query_lens), q_heads, dims[0], device=device).to(dtype)
    return Paged(q, k[new], None if v is None else v[new], arena, layout, batch)


def random_tree(nodes: int, seed: int = 0) -> list[int]:
    """Per node the bits of itself and its ancestors, in a tree whose nodes come after their parents."""
    rng = random.Random(seed)
    bits = [1]
    for i in range(1, nodes):
        bits.append(1 << i | bits[rng.randrange(i)])
    return bits
