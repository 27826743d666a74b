"""What lies between the qkv projection and the output projection, as operations of a program, against torch."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from llmtool_kernels.attention import AttentionBatch, KVLayout, paged_attention_reference
from llmtool_kernels.cpu import abi
from llmtool_kernels.cpu.attention import arrangement
from llmtool_kernels.cpu.native import Native
from llmtool_kernels.cpu.program import Program, StepState

from tests.kernels.gpu.pages import random_tree

HEADS, KV_HEADS, EPS, SCALE = 6, 2, 1e-5, 0.2
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 2e-5}, torch.bfloat16: {"atol": 0.03, "rtol": 0.03}}


class Both:
    """The same tokens through a program and through torch, each with an arena of its own, full of NaN."""

    def __init__(self, native: Native, dtype: torch.dtype, dim: int, page: int, qk_norm: str | None) -> None:
        self.native, self.dtype, self.dim, self.page, self.qk_norm = native, dtype, dim, page, qk_norm
        page_bytes = page * KV_HEADS * 2 * dim * dtype.itemsize
        self.layout = KVLayout(page_bytes, page, KV_HEADS, dim, dim)  # the second of two layers
        self.unit = -(-2 * page_bytes // 512)
        self.arenas = [torch.full((120 * self.unit * 512,), 0xFF, dtype=torch.uint8) for _ in range(2)]
        self.free = random.Random(0).sample(range(120), 120)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        heads = {"head": (1, 1), "all": (HEADS, KV_HEADS)}.get(qk_norm or "", (0, 0))
        self.norms = [torch.randn(n * dim) if n else None for n in heads]

    def step(
        self,
        news: dict[int, int],
        window: int | None,
        sinks: torch.Tensor | None,
        turned: int,
        tree: list[int] | None = None,
    ) -> None:
        for s, n in news.items():
            self.lengths[s] = self.lengths.get(s, 0) + n
            table = self.tables.setdefault(s, [])
            while len(table) * self.page < self.lengths[s]:
                table.append(self.free.pop() * self.unit)
        batch = AttentionBatch.build(
            list(news.values()),
            [self.lengths[s] for s in news],
            [self.tables[s] for s in news],
            self.page,
            tree=tree,
        )
        rows, width = sum(news.values()), (HEADS + 2 * KV_HEADS) * self.dim
        qkv = torch.randn(rows, width)
        angle = torch.randn(rows, 1, turned // 2)
        cos, sin = angle.cos(), angle.sin()
        expected = self.by_torch(qkv, batch, window, sinks, cos, sin)
        got = self.by_program(qkv, batch, window, sinks, cos, sin)
        torch.testing.assert_close(got, expected, **CLOSE[self.dtype])

    def by_program(
        self,
        qkv: torch.Tensor,
        batch: AttentionBatch,
        window: int | None,
        sinks: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        rows = len(qkv)
        q = torch.empty(rows, HEADS * self.dim, dtype=self.dtype)
        out = torch.empty_like(q)
        program = Program(self.native)
        rope = 0 if cos.numel() else None
        program.qkv_post(qkv, q, self.layout, 0, EPS, self.qk_norm, *self.norms, rope)
        program.attention(q, out, self.layout, 0, SCALE, window, 30.0, sinks)
        program.run(StepState(torch.zeros(rows, dtype=torch.int64), self.arenas[0], [batch], [(cos, sin)]))
        return out.view(rows, HEADS, self.dim)

    def by_torch(
        self,
        qkv: torch.Tensor,
        batch: AttentionBatch,
        window: int | None,
        sinks: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        sizes = (HEADS * self.dim, KV_HEADS * self.dim, KV_HEADS * self.dim)
        q, k, v = qkv.split(sizes, dim=1)
        q, k = (self.normed(t, norm) for t, norm in zip((q, k), self.norms, strict=True))
        q, k, v = (t.unflatten(1, (-1, self.dim)) for t in (q, k, v))
        half = cos.shape[-1]
        for t in (q, k):
            a, b = t[..., :half].clone(), t[..., half : 2 * half].clone()
            t[..., :half], t[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin
        return paged_attention_reference(
            *(t.to(self.dtype) for t in (q, k, v)),
            self.arenas[1],
            self.layout,
            batch,
            SCALE,
            window,
            30.0,
            sinks,
        )

    def normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is None:
            return x.clone()
        return F.rms_norm(x.unflatten(1, (-1, len(weight))), (len(weight),), weight, EPS).flatten(1)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("qk_norm", [None, "head", "all"])
@pytest.mark.parametrize(
    ("dim", "page", "tiles"), [(64, 16, True), (32, 48, True), (32, 8, False), (20, 16, False)]
)
def test_steps(
    native: Native,
    threads: int,
    dtype: torch.dtype,
    qk_norm: str | None,
    dim: int,
    page: int,
    tiles: bool,
) -> None:
    """Whatever the pages' arrangement: chunks and single tokens, odd lengths, windows, sinks, partial rotation."""
    torch.manual_seed(0)
    both = Both(native, dtype, dim, page, qk_norm)
    assert (arrangement(both.layout) == abi.TILES) == tiles
    both.step({0: 1, 1: 300, 2: 17}, None, None, dim)
    both.step({0: 1, 1: 1, 3: 3}, 5, torch.randn(HEADS), dim // 2 // 2 * 2)
    both.step({2: 1, 1: 21, 0: 2}, 270, None, 0)
    both.step({1: 1, 3: 1}, None, torch.randn(HEADS), dim)
    tree = [*random_tree(40), 1, *random_tree(9, seed=1)]
    both.step({1: 40, 3: 1, 0: 9}, None, None, dim, tree)
    both.step({1: 40, 3: 1, 0: 9}, 270, torch.randn(HEADS), dim, tree)


def test_a_batch_of_nothing_but_one_token_alone_is_the_same(native: Native, threads: int) -> None:
    """Bit for bit, on tiles: alone, and beside a long prompt."""
    torch.manual_seed(0)
    both = Both(native, torch.bfloat16, 64, 16, None)
    both.step({0: 290, 1: 100}, None, None, 0)
    results = []
    qkv = torch.randn(41, (HEADS + 2 * KV_HEADS) * 64)
    for others in (0, 40):
        rows = qkv[: 1 + others]
        lens, tables = [1], [both.tables[0]]
        totals = [290]
        if others:
            lens, tables, totals = [1, others], [both.tables[0], both.tables[1]], [290, 100]
        batch = AttentionBatch.build(lens, totals, tables, 16)
        empty = torch.zeros(len(rows), 1, 0)
        results.append(both.by_program(rows, batch, None, None, empty, empty)[0])
    assert torch.equal(*results)


def test_what_pages_cannot_hold_is_refused(native: Native) -> None:
    layout = KVLayout(0, 16, 1, 2000, 32)
    program = Program(native)
    q = torch.empty(1, 2000)
    program.qkv_post(torch.empty(1, 4032), q, layout, 0, EPS)
    with pytest.raises(ValueError, match="operation 0"):
        program.run(StepState(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.uint8), [], []))
