"""A decoder run over scattered KV pages of an arena full of NaN, a chunk at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from llmtool_kernels.attention import AttentionBatch, KVLayout

from llmtool.core.memory.geometry import uniform_group
from llmtool.models.decoder import Decoder, KVContext


class PagedSequences:
    """Sequences that grow by chunks; logits of every new token come back."""

    def __init__(
        self,
        model: Decoder,
        tokens_per_page: int = 4,
        num_pages: int = 64,
        stored: torch.dtype | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """stored, scales: KVLayout's dtype, k_scale and v_scale."""
        self.model = model
        self.group = uniform_group(
            model.spec.layer_cache_specs((stored or model.dtype).itemsize), tokens_per_page
        )
        self.arena = torch.full(
            (num_pages * self.group.page_bytes,), 0xFF, dtype=torch.uint8, device=model.device
        )
        self.free = [i * self.group.page_units for i in range(num_pages)]
        random.Random(0).shuffle(self.free)
        self.layers = {
            spec.layer: (
                KVLayout(
                    offset,
                    tokens_per_page,
                    spec.num_kv_heads,
                    spec.k_head_dim,
                    spec.v_head_dim,
                    stored,
                    *scales,
                ),
                0,
            )
            for spec, offset in zip(self.group.layers, self.group.layer_offsets, strict=True)
        }
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    @torch.inference_mode()
    def step(
        self,
        chunks: dict[str, Sequence[int]],
        tree: Sequence[int] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """One step for all of `chunks`; per sequence the logits [tokens, vocab] of its chunk.

        tree: AttentionBatch's, of tokens that then stand at their depth. wanted: rows of the whole step [M];
        then all that comes back is one tensor [M, vocab].
        """
        positions: list[int] = []
        for name, ids in chunks.items():
            start = self.lengths.get(name, 0)
            self.lengths[name] = start + len(ids)
            if tree is None:
                positions += range(start, start + len(ids))
            else:
                nodes = tree[len(positions) : len(positions) + len(ids)]
                positions += [start + bits.bit_count() - 1 for bits in nodes]
            table = self.tables.setdefault(name, [])
            table += [self.free.pop() for _ in range(self.group.pages(start + len(ids)) - len(table))]
        query_lens = [len(ids) for ids in chunks.values()]
        batch = AttentionBatch.build(
            query_lens,
            [self.lengths[name] for name in chunks],
            [self.tables[name] for name in chunks],
            self.group.tokens_per_page,
            self.model.device,
            tree,
        )
        device = self.model.device
        input_ids = torch.tensor([i for ids in chunks.values() for i in ids], device=device)
        at = torch.tensor(positions, device=device)
        kv = KVContext(self.arena, self.layers, (batch,))
        if wanted is not None:
            some = self.model.forward(
                input_ids, at, kv, torch.tensor(wanted, dtype=torch.int64, device=device)
            )
            return [self.model.logits(some)] if len(wanted) else [some]
        hidden = self.model.forward(input_ids, at, kv)
        return list(self.model.logits(hidden).split(query_lens))
