"""Attention through the two-level allocator's tables, for every kind of page, against dense attention: prompts in
parts, prefix hits, forks, rollbacks, swapping and eviction, under every page plan, in torch and in C++."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from llmtool_kernels.attention import AttentionBatch, paged_attention, paged_attention_reference

from llmtool.core.memory.allocator import Extension, OutOfPages
from llmtool.core.memory.geometry import LayerCacheSpec
from llmtool.core.memory.model import ModelGeometry
from llmtool.core.memory.page_plan import Mode, plan_pages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.runtime.kv_store import KVStore
from tests.kernels.store import dense

Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> K, V
FULL = LayerCacheSpec(0, 2, 16, 16, 4)
LATENT = LayerCacheSpec(0, 1, 24, 0, 4, "mla")
NARROW = replace(FULL, num_kv_heads=1, v_head_dim=8)
MODELS = {
    "full and windows": [FULL, *[replace(FULL, kind="sliding_window", window=n) for n in (9, 9, 9, 21)]],
    "windows of other rows": [FULL, replace(NARROW, kind="sliding_window", window=13)],
    "latent and window": [LATENT, replace(FULL, kind="sliding_window", window=6)],
    "a draft beside its target": [FULL, FULL, replace(NARROW, kind="draft")],
}
RUNS = {"torch": paged_attention_reference, "as it runs here": paged_attention}


def rows(spec: LayerCacheSpec, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The KV of all tokens in a layer: each position's follows from all tokens up to it."""
    keys, values, state = [], [], spec.layer
    for token in tokens:
        state = zlib.crc32(f"{state} {token}".encode())
        draw = torch.Generator().manual_seed(state)
        keys.append(torch.randn(spec.num_kv_heads, spec.k_head_dim, generator=draw))
        values.append(torch.randn(spec.num_kv_heads, spec.v_head_dim, generator=draw))
    return torch.stack(keys), torch.stack(values)


class World:
    """Sequences over an allocator and an arena that starts out as NaN. Each step is compared as it runs."""

    def __init__(self, layers: list[LayerCacheSpec], mode: Mode, run: Callable[..., torch.Tensor]) -> None:
        specs = tuple(replace(spec, layer=i) for i, spec in enumerate(layers))
        plan = plan_pages(ModelGeometry("test", specs), 4, 16384, mode)
        self.a = TwoLevelAllocator(plan, 30, host_pages=30, step_tokens=16)
        self.store = KVStore(plan.groups, 30, 30, page_bytes=plan.large_page)
        self.store.arena.fill_(0xFF)
        self.specs, self.run = {spec.layer: spec for spec in specs}, run
        self.tokens: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}
        self.steps = 0

    def grow(self, seq: str, end: int) -> None:
        grown: Extension | None = self.a.extend(seq, end)
        if grown is not None:
            self.store.copy(list(grown.copies))
        self.step(seq, end)

    def step(self, seq: str, end: int) -> None:
        start = self.done[seq]
        tables = self.a.table(seq)
        for layer, (layout, group) in self.store.places().items():
            spec = self.specs[layer]
            k, v = rows(spec, self.tokens[seq][:end])
            q = torch.randn(end - start, 2 * spec.num_kv_heads, spec.k_head_dim)
            batch = AttentionBatch.build([end - start], [end], [tables[group]], layout.tokens_per_page)
            latent = {"value_dim": 16} if spec.kind == "mla" else {}
            new_v = None if latent else v[start:]
            ours = self.run(q, k[start:], new_v, self.store.arena, layout, batch, 0.3, spec.window, **latent)
            seen = k[..., :16] if latent else v
            expected = torch.stack(
                [dense(q[p - start], k, seen, p, 0.3, spec.window) for p in range(start, end)]
            )
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
        self.done[seq] = end
        self.a.advance(seq, end)
        self.steps += 1

    def begin(self, seq: str, tokens: list[int]) -> int:
        hit = self.a.begin(seq, tokens, 16)
        self.tokens[seq], self.done[seq] = tokens, hit
        self.step(seq, min(len(tokens), hit + 16))
        while self.done[seq] < len(tokens):
            self.grow(seq, min(len(tokens), self.done[seq] + 16))
        return hit

    def forget(self, seq: str) -> None:
        self.a.end(seq)
        del self.tokens[seq], self.done[seq]


@pytest.mark.parametrize("mode", ["near", "lcm", "max"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("run", RUNS)
def test_every_page_is_read_as_dense_attention_reads(name: str, mode: Mode, run: str) -> None:
    torch.manual_seed(0)
    draw = random.Random(f"{name} {mode}")
    world = World(MODELS[name], mode, RUNS[run])
    hits = evictions = 0
    for i in range(60):
        live = sorted(world.tokens)
        choice: Any = draw.choice(["begin", "begin", "grow", "grow", "fork", "back", "swap", "end"])
        seq = draw.choice(live) if live else ""
        try:
            if choice == "begin" or not live:
                cut = draw.choice([8, 17, 24, 33])
                tokens = [*range(cut), *[draw.randrange(100, 104) for _ in range(draw.randint(1, 20))]]
                hits += world.begin(f"s{i}", tokens) > 0
            elif choice == "grow":
                for _ in range(draw.randint(1, 6)):
                    world.tokens[seq].append(draw.randrange(3))
                    world.grow(seq, len(world.tokens[seq]))
            elif choice == "fork":
                world.tokens[f"s{i}"], world.done[f"s{i}"] = list(world.tokens[seq]), world.done[seq]
                world.a.fork(seq, f"s{i}", world.tokens[f"s{i}"], world.done[seq])
            elif choice == "back" and world.a.can_fork(seq, world.done[seq] - 3):
                world.done[seq] -= 3
                del world.tokens[seq][-3:]
                world.a.truncate(seq, world.done[seq])
            elif choice == "swap":
                copies = world.a.swap_out(seq)
                if copies is not None:
                    world.store.swap_out(copies)
                    world.store.swap_in(world.a.swap_in(seq))
            elif choice == "end":
                world.forget(seq)
        except OutOfPages:
            evictions += 1
            for seq in live:
                world.forget(seq)
            if f"s{i}" in world.tokens:
                world.forget(f"s{i}")
        world.a.check()
    assert world.steps > 40 and hits > 3
