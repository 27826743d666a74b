"""How a step's attention is cut into pieces of dense work: lengths on the host in, index tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond this many gathered tokens one bucket falls out of the CPU's caches and costs more than two.
MAX_BUCKET_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """One dense call: s sequences with a query each (chunk False), or one with R queries (chunk True).

    rows: int64 [R], rows of q. units: int64 [s, w], the pages read, in order. length: tokens kept of the
    padded_len = w * tokens_per_page gathered. mask: additive, [s, 1, 1, length] or [R, length]; None when all
    is seen, or `causal` says what is. stale: (sequence, position) of gathered slots that are not its own.
    """

    rows: Tensor
    units: Tensor
    padded_len: int
    length: int
    chunk: bool
    mask: Tensor | None
    causal: bool
    stale: tuple[Tensor, Tensor] | None

    @property
    def num_seqs(self) -> int:
        return self.units.shape[0]


@dataclass(frozen=True, slots=True)
class _Span:
    """What one sequence reads: num_pages pages from first_page on, `length` tokens from first_token on."""

    sequence: int
    row: int  # its first row of q
    query_len: int
    kv_len: int
    first_page: int
    num_pages: int
    first_token: int

    @property
    def length(self) -> int:
        return self.kv_len - self.first_token


def plan_step(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_tables: Tensor,
    window: int | None,
    tokens_per_page: int,
    dtype: torch.dtype,
    tree: Tensor | None = None,
) -> list[AttentionWork]:
    """The work of one step for all layers with this window. block_tables: int32 [S, W], in units."""
    single: list[_Span] = []
    chunks: list[_Span] = []
    row = 0
    for s, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        assert 0 <= query_len <= kv_len, f"sequence {s}: {query_len} new of {kv_len} tokens"
        oldest = 0 if window is None else max(0, kv_len - query_len + 1 - window)
        first = oldest // tokens_per_page
        last = -(-kv_len // tokens_per_page)
        span = _Span(s, row, query_len, kv_len, first, last - first, first * tokens_per_page)
        row += query_len
        if query_len:
            (single if query_len == 1 else chunks).append(span)
    work = [
        _bucket_work(bucket, block_tables, window, tokens_per_page, dtype)
        for bucket in _buckets(single, tokens_per_page)
    ]
    return work + [_chunk_work(span, block_tables, window, tokens_per_page, dtype, tree) for span in chunks]


def _buckets(spans: list[_Span], tokens_per_page: int) -> Iterator[list[_Span]]:
    """Spans of similar length together, so that at most a fifth of what a bucket reads is padding."""
    ordered = sorted(spans, key=lambda span: -span.num_pages)
    bucket: list[_Span] = []
    for span in ordered:
        if bucket:
            longest = bucket[0].num_pages
            full = (len(bucket) + 1) * longest * tokens_per_page > MAX_BUCKET_TOKENS
            if full or longest - span.num_pages > max(1, longest // 5):
                yield bucket
                bucket = []
        bucket.append(span)
    if bucket:
        yield bucket


def _bucket_work(
    spans: list[_Span], block_tables: Tensor, window: int | None, tokens_per_page: int, dtype: torch.dtype
) -> AttentionWork:
    device = block_tables.device
    num_pages = max(span.num_pages for span in spans)
    length = max(span.length for span in spans)
    fields = [[s.sequence, s.row, s.kv_len, s.first_page, s.num_pages, s.first_token] for s in spans]
    sequence, row, kv_len, first_page, pages, first_token = torch.tensor(fields).T[:, :, None]  # each [s, 1]
    # Past its own pages a sequence re-reads its last one: valid memory, and masked like all of its tail.
    page = first_page + torch.minimum(torch.arange(num_pages), pages - 1)
    position = first_token + torch.arange(length)  # [s, length]
    beyond = position >= kv_len
    hidden = beyond if window is None else beyond | (position < kv_len - window)
    # All on the host until here, where every length is known: asking a device whether to mask would wait for it.
    stale = beyond.nonzero(as_tuple=True)
    return AttentionWork(
        rows=row[:, 0].to(device),
        units=block_tables[sequence.to(device), page.to(device)].long(),
        padded_len=num_pages * tokens_per_page,
        length=length,
        chunk=False,
        mask=_additive(hidden, dtype)[:, None, None].to(device) if hidden.any() else None,
        causal=False,
        stale=(stale[0].to(device), stale[1].to(device)) if len(stale[0]) else None,
    )


def _chunk_work(
    span: _Span,
    block_tables: Tensor,
    window: int | None,
    tokens_per_page: int,
    dtype: torch.dtype,
    tree: Tensor | None,
) -> AttentionWork:
    device = block_tables.device
    rows = torch.arange(span.row, span.row + span.query_len, device=device)
    causal = tree is None and span.query_len == span.kv_len and (window is None or span.kv_len <= window)
    mask = None
    if not causal:
        hidden = _hidden(span, window, None if tree is None else tree[rows], device)
        mask = _additive(hidden, dtype)
    last_page = span.first_page + span.num_pages
    return AttentionWork(
        rows=rows,
        units=block_tables[span.sequence, span.first_page : last_page].long()[None],
        padded_len=span.num_pages * tokens_per_page,
        length=span.length,
        chunk=True,
        mask=mask,
        causal=causal,
        stale=None,
    )


def _hidden(span: _Span, window: int | None, tree: Tensor | None, device: torch.device) -> Tensor:
    """[R, length]: which of the tokens from first_token on a chunk's queries do not see. tree: their bits [R]."""
    context = span.kv_len - span.query_len
    query = torch.arange(context, span.kv_len, device=device)[:, None]
    key = torch.arange(span.first_token, span.kv_len, device=device)
    if tree is None:
        hidden = key > query
    else:
        assert span.query_len <= 64, "a tree has at most 64 nodes"
        ancestors = (tree[:, None] >> torch.arange(span.query_len, device=device)) & 1  # [R, R]
        hidden = torch.zeros(len(query), len(key), dtype=torch.bool, device=device)
        hidden[:, context - span.first_token :] = ancestors == 0
        query = context + ancestors.sum(1, keepdim=True) - 1
    if window is not None:
        hidden |= key <= query - window
    return hidden


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
