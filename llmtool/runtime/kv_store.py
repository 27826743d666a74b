"""The memory that block tables point into: an arena of pages on the device, and one on the host for swapping."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from llmtool_kernels.attention import KVLayout, copy_pages

from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.ports import PageCopy


class KVStore:
    """Pages of one KV group. num_pages on `device`, host_pages in host memory; both flat uint8 arenas.

    dtype: float8 of keys and values, None for the model's own. scales: of float8, model layer -> those of its keys
    and values; 1 of a layer without.
    """

    def __init__(
        self,
        group: KVCacheGroup,
        num_pages: int,
        host_pages: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        scales: Mapping[int, tuple[float, float]] | None = None,
    ) -> None:
        assert num_pages >= 1
        self.group = group
        self.num_pages = num_pages
        self.host_pages = host_pages
        self.device = torch.device(device)
        self.dtype = dtype
        self._scales = scales or {}
        assert dtype is None or all(spec.dtype_bytes == dtype.itemsize for spec in group.layers)
        self.arena = _arena(num_pages * group.page_bytes, self.device)  # uint8 [num_pages * page_bytes]
        host_bytes = max(1, host_pages) * group.page_bytes  # a view needs at least one page
        pinned = self.device.type == "cuda" and host_pages > 0
        self.host = (
            torch.empty(host_bytes, dtype=torch.uint8, pin_memory=True)
            if pinned
            else _arena(host_bytes, torch.device("cpu"))
        )

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.group.page_bytes

    @property
    def host_nbytes(self) -> int:
        return self.host_pages * self.group.page_bytes

    def layouts(self) -> dict[int, KVLayout]:
        """Model layer -> where its keys and values lie inside a page."""
        group = self.group
        return {
            spec.layer: KVLayout(
                offset,
                group.tokens_per_page,
                spec.num_kv_heads,
                spec.k_head_dim,
                spec.v_head_dim,
                self.dtype,
                *self._scales.get(spec.layer, (1.0, 1.0)),
            )
            for spec, offset in zip(group.layers, group.layer_offsets, strict=True)
        }

    def swap_out(self, copies: Sequence[PageCopy]) -> None:
        copy_pages(self.host, self.arena, _pairs(copies), self.group.page_bytes)

    def swap_in(self, copies: Sequence[PageCopy]) -> None:
        copy_pages(self.arena, self.host, _pairs(copies), self.group.page_bytes)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        copy_pages(self.arena, self.arena, _pairs(copies), self.group.page_bytes)


def _pairs(copies: Sequence[PageCopy]) -> list[tuple[int, int]]:
    return [(copy.src, copy.dst) for copy in copies]


def _arena(nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes]. On a CPU from anonymous pages: zero, and real memory only once they are written."""
    if device.type == "cpu":
        memory = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a layer's KV of a page is short: most reads would miss the TLB
            with suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)
