"""Sequences in scattered pages of an arena that starts out as NaN, and attention by a double loop beside them."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from llmtool_kernels.attention import UNIT, AttentionBatch, KVLayout, paged_attention_reference

NEVER_READ = 2**30  # in tables past a sequence's pages: far outside any arena
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Store:
    """Sequences and their true KV, kept densely; pages handed out in a random order."""

    kv_heads: int
    k_dim: int
    v_dim: int
    page_tokens: int
    layers: int = 2
    dtype: torch.dtype = torch.float32
    num_pages: int = 64
    run: Callable[..., torch.Tensor] = paged_attention_reference
    shared: int = 0  # so many leading dimensions of K are V, of which nothing is stored
    k: dict[int, torch.Tensor] = field(default_factory=dict)  # sequence -> [tokens, Hkv, Dk]
    v: dict[int, torch.Tensor] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layer_bytes = self.page_tokens * self.kv_heads * (self.k_dim + self.v_dim) * self.dtype.itemsize
        self.page_bytes = -(-layer_bytes * self.layers // UNIT) * UNIT
        self.layout = KVLayout(
            layer_bytes, self.page_tokens, self.kv_heads, self.k_dim, self.v_dim
        )  # the 2nd layer
        self.arena = torch.full(
            (self.num_pages * self.page_bytes,), 0xFF, dtype=torch.uint8
        )  # NaN in every dtype
        self.free = [i * self.page_bytes // UNIT for i in range(self.num_pages)]
        random.Random(0).shuffle(self.free)

    def extend(self, sequence: int, n: int) -> int:
        """Give the sequence n more random tokens, and pages for them; its new length."""
        for store, dim in ((self.k, self.k_dim), (self.v, self.v_dim)):
            new = torch.randn(n, self.kv_heads, dim).to(self.dtype)
            store[sequence] = torch.cat((store.get(sequence, new[:0]), new))
        total = len(self.k[sequence])
        table = self.tables.setdefault(sequence, [])
        while len(table) * self.page_tokens < total:
            table.append(self.free.pop())
        return total

    def step(self, news: dict[int, int], q_heads: int, window: int | None, **extra: Any) -> Pair:
        """Run the step in which each sequence gets that many tokens; (ours, the oracle's), both [N, Hq, Dv]."""
        totals = [self.extend(s, n) for s, n in news.items()]
        return self.attend(list(news), list(news.values()), totals, q_heads, window, **extra)

    def attend(
        self,
        sequences: list[int],
        query_lens: list[int],
        totals: list[int],
        q_heads: int,
        window: int | None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Pair:
        batch = AttentionBatch.build(
            query_lens, totals, [self.tables[s] for s in sequences], self.page_tokens
        )
        lengths = torch.tensor([len(self.tables[s]) for s in sequences])[:, None]
        batch.block_tables[torch.arange(batch.block_tables.shape[1]) >= lengths] = NEVER_READ
        spans = [(s, t - n, t) for s, n, t in zip(sequences, query_lens, totals, strict=True)]
        k = torch.cat([self.k[s][a:b] for s, a, b in spans])
        v = torch.cat([self.v[s][a:b] for s, a, b in spans])
        q = torch.randn(len(k), q_heads, self.k_dim).to(self.dtype)
        scale = 1 / math.sqrt(self.k_dim)
        shared = {"v": None, "value_dim": self.shared} if self.shared else {"v": v}
        call = functools.partial(
            self.run,
            q=q,
            k=k,
            layout=self.layout,
            batch=batch,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            **shared,
        )
        if self.run is not paged_attention_reference:  # which the double loop vouches for, and is faster
            expected = paged_attention_reference(arena=self.arena.clone(), **call.keywords)
            return call(arena=self.arena), expected
        ours = call(arena=self.arena)
        rows = [(s, p) for s, a, b in spans for p in range(a, b)]
        values = {s: self.k[s][..., : self.shared] if self.shared else self.v[s] for s in sequences}
        expected = [
            dense(q[i], self.k[s], values[s], p, scale, window, softcap, sinks)
            for i, (s, p) in enumerate(rows)
        ]
        return ours, torch.stack(expected)


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token's attention, head by head, in float64. q [Hq, Dk]; k, v [tokens, Hkv, D] -> [Hq, Dv]."""
    first = 0 if window is None else max(0, position - window + 1)
    group = len(q) // k.shape[1]
    out = []
    for head in range(len(q)):
        keys, values = (x[first : position + 1, head // group].double() for x in (k, v))
        scores = keys @ q[head].double() * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if sinks is not None:
            scores = torch.cat((scores, sinks[head : head + 1].double()))
        out.append(scores.softmax(0)[: len(values)] @ values)
    return torch.stack(out).to(q.dtype)
