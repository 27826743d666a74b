"""Paged attention on CUDA. The reference is `llmtool_kernels.attention.paged_attention`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmtool_kernels.attention import UNIT, AttentionBatch, KVLayout
from llmtool_kernels.gpu import table
from llmtool_kernels.gpu.attention_kernel import attention_kernel
from llmtool_kernels.gpu.plan import WIDTH, max_segments, max_slots, num_tiles, plan_segments
from llmtool_kernels.gpu.platform import multiprocessors, power_of_2, shared_memory


@dataclass(slots=True)
class Work:
    """One launch of a step, in device memory that `refresh` fills again for a step of the same shape.

    chosen: numbers of its sequences. memory: int32, behind each other starts [P + 1], segments [S, WIDTH] and
    counters, each from a multiple of four. partials: per slot its tile's sums, and their maxima and lengths.
    """

    config: table.Config
    programs: int
    chosen: tuple[int, ...]
    group: int
    num_kv_heads: int
    window: int | None
    value_dim: int
    tree: bool
    memory: Tensor
    segments_at: int
    counters_at: int
    partial_acc: Tensor  # float32 [slots, block_m, value_dim]
    partial_ml: Tensor  # float32 [slots, 2, block_m]

    @property
    def starts(self) -> Tensor:
        return self.memory

    @property
    def segments(self) -> Tensor:
        return self.memory[self.segments_at :]

    @property
    def counters(self) -> Tensor:
        return self.memory[self.counters_at :]

    def refresh(self, query_lens: Sequence[int], kv_lens: Sequence[int]) -> None:
        """Plan a step in which the sequences have these lengths; as many queries each as when it was made.

        Never waits for the device. A captured graph that reads this work then runs the new step.
        """
        config = self.config
        plan = plan_segments(
            query_lens,
            kv_lens,
            self.chosen,
            self.num_kv_heads,
            self.group,
            self.window,
            config.block_m,
            config.block_n,
            self.programs,
            self.tree,
        )
        host = np.zeros(self.memory.numel(), np.int32)
        host[: len(plan.starts)] = plan.starts
        host[self.segments_at : self.segments_at + plan.rows.size] = plan.rows.reshape(-1)
        assert self.segments_at + plan.rows.size <= self.counters_at
        assert plan.num_slots <= len(self.partial_ml)
        self.memory.copy_(torch.from_numpy(host), non_blocking=True)


def read_pages(
    q: Tensor,
    arena: Tensor,
    layout: KVLayout,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """`paged_attention` of q [N, Hq, Dk] whose KV is written already; value_dim: values are so much of the keys.

    Launches one kernel for the sequences with few query rows and one for those with many; neither waits for the
    device, and what they allocate depends on the step's lengths only.
    """
    out = q.new_empty(q.shape[0], q.shape[1], value_dim or layout.v_head_dim)
    for work in plan(q, layout, batch, window, value_dim):
        _launch(out, q, arena, layout, batch, work, scale, softcap, sinks, latent=value_dim is not None)
    return out


def runs(q: Tensor, layout: KVLayout) -> bool:
    """Whether the kernel fits into the device's shared memory for heads of this size and type."""
    return table.fits(layout.k_head_dim, q.dtype.itemsize, shared_memory(q.device))


def plan(
    q: Tensor, layout: KVLayout, batch: AttentionBatch, window: int | None, value_dim: int | None
) -> list[Work]:
    """The step's launches, made by the first layer that asks and shared by all alike."""
    batch.check_window(window)
    dims = (layout.k_head_dim, value_dim or layout.v_head_dim)
    group = q.shape[1] // layout.num_kv_heads
    sizes = (q.dtype.itemsize, layout.element(q.dtype).itemsize)
    key = ("gpu", window, group, layout.num_kv_heads, dims, sizes, value_dim is None)
    if key not in batch._plans:
        batch._plans[key] = list(_works(q.device, batch, group, layout.num_kv_heads, window, dims, sizes))
    works: list[Work] = batch._plans[key]
    return works


def _works(
    device: torch.device,
    batch: AttentionBatch,
    group: int,
    num_kv_heads: int,
    window: int | None,
    dims: tuple[int, int],
    sizes: tuple[int, int],
) -> Iterator[Work]:
    rows = [n * group for n in batch.query_lens]
    narrow = [s for s, n in enumerate(rows) if 0 < n <= table.MAX_NARROW]
    wide = [s for s, n in enumerate(rows) if n > table.MAX_NARROW]
    for chosen in (narrow, wide):
        if not chosen:
            continue
        config = table.choose(max(rows[s] for s in chosen), *dims, *sizes, shared_memory(device))
        programs = config.per_processor * multiprocessors(device)
        tiles = num_tiles(batch.query_lens, chosen, num_kv_heads, group, config.block_m)
        segments_at = _aligned(programs + 1)
        counters_at = segments_at + _aligned(max_segments(tiles, programs) * WIDTH)
        slots = max_slots(programs)
        work = Work(
            config,
            programs,
            tuple(chosen),
            group,
            num_kv_heads,
            window,
            dims[1],
            batch.tree is not None,
            torch.empty(counters_at + programs, dtype=torch.int32, device=device),
            segments_at,
            counters_at,
            torch.empty(slots, config.block_m, dims[1], dtype=torch.float32, device=device),
            torch.empty(slots, 2, config.block_m, dtype=torch.float32, device=device),
        )
        work.refresh(batch.query_lens, batch.kv_lens)
        yield work


def _aligned(n: int) -> int:
    return -(-n // 4) * 4


def _launch(
    out: Tensor,
    q: Tensor,
    arena: Tensor,
    layout: KVLayout,
    batch: AttentionBatch,
    work: Work,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    latent: bool,
) -> None:
    attention_kernel[(work.programs,)](
        *arguments(out, q, arena, layout, batch, work, scale, softcap, sinks),
        **constants(
            q.dtype, q.shape[1], layout, work, softcap, sinks is not None, batch.tree is not None, latent
        ),
        num_warps=work.config.num_warps,
        num_stages=work.config.num_stages,
    )


def arguments(
    out: Tensor,
    q: Tensor,
    arena: Tensor,
    layout: KVLayout,
    batch: AttentionBatch,
    work: Work,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[object, ...]:
    """Of the kernel, those known when it runs."""
    assert q.stride(2) == 1
    element = layout.element(q.dtype)
    layer_offset = layout.layer_offset // element.itemsize
    k_width = layout.tokens_per_page * layout.num_kv_heads * layout.k_head_dim
    shared = layout.v_head_dim == 0
    return (
        out,
        q,
        arena.view(element),
        batch.block_tables,
        work.starts,
        work.segments,
        work.counters,
        work.partial_acc,
        work.partial_ml,
        q if sinks is None else sinks,
        q if batch.tree is None else batch.tree,
        q.stride(0),
        q.stride(1),
        layer_offset + (0 if shared else k_width),
        batch.block_tables.stride(0),
        layer_offset,
        work.window or 0,
        scale * layout.k_scale,
        softcap or 1.0,
        layout.sum_scale,
    )


def constants(
    dtype: torch.dtype,
    num_heads: int,
    layout: KVLayout,
    work: Work,
    softcap: float | None,
    sinks: bool,
    tree: bool,
    latent: bool,
) -> dict[str, object]:
    """Of the kernel, those it is compiled for."""
    k_dim, heads = layout.k_head_dim, layout.num_kv_heads
    d1, d2 = split_dim(k_dim)
    v_head = k_dim if latent else layout.v_head_dim
    return {
        "UNIT": UNIT // layout.element(dtype).itemsize,
        "PAGE": layout.tokens_per_page,
        "KV_HEADS": heads,
        "GROUP": num_heads // heads,
        "K_STRIDE": heads * k_dim,
        "V_STRIDE": heads * v_head,
        "V_HEAD": v_head,
        "DK": k_dim,
        "D1": d1,
        "D2": d2,
        "DV": work.value_dim,
        "DV_PAD": max(16, power_of_2(work.value_dim)),
        "SHARED": latent and work.value_dim == d1,
        "WINDOW": work.window is not None,
        "SOFTCAP": softcap is not None,
        "SINKS": sinks,
        "TREE": tree,
        "PHASES": work.config.phases,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "BLOCK_M": work.config.block_m,
        "BLOCK_N": work.config.block_n,
        "WIDTH": WIDTH,
    }


def split_dim(dim: int) -> tuple[int, int]:
    """A head's dimensions as two powers of two of at least 16, so that 576 is 512 + 64, not 1024; or one and 0."""
    if dim <= 16 or dim & (dim - 1) == 0:
        return max(16, power_of_2(dim)), 0
    first = power_of_2(dim) // 2
    return first, max(16, power_of_2(dim - first))
