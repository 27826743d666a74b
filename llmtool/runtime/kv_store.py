"""The memory that block tables point into: an arena of pages on the device, and one on the host for swapping."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from llmtool_kernels.attention import KVLayout, copy_pages

from llmtool.core.memory.geometry import STATES, UNIT, KVCacheGroup
from llmtool.core.ports import PageCopy
from llmtool.models.recurrent import StatePlace


class KVStore:
    """Pages of one KV group or several. num_pages on `device`, host_pages in host memory; both flat uint8 arenas.

    page_bytes: of a page that several groups share, with small pages of theirs in it; None for the group's own.
    dtype: float8 of keys and values, None for the model's own. scales: of float8, model layer -> those of its keys
    and values; 1 of a layer without.
    """

    def __init__(
        self,
        groups: KVCacheGroup | Sequence[KVCacheGroup],
        num_pages: int,
        host_pages: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        scales: Mapping[int, tuple[float, float]] | None = None,
        page_bytes: int | None = None,
    ) -> None:
        assert num_pages >= 1
        self.groups = (groups,) if isinstance(groups, KVCacheGroup) else tuple(groups)
        assert page_bytes is not None or len(self.groups) == 1, "pages of several sizes lie in large ones"
        self.page_bytes = self.groups[0].page_bytes if page_bytes is None else page_bytes
        self.num_pages = num_pages
        self.host_pages = host_pages
        self.device = torch.device(device)
        self.dtype = dtype
        self._scales = scales or {}
        attention = [spec for group in self.groups for spec in group.layers if spec.kind not in STATES]
        assert dtype is None or all(spec.dtype_bytes == dtype.itemsize for spec in attention)
        self.arena = _arena(self.nbytes, self.device)  # uint8 [num_pages * page_bytes]
        host_bytes = max(1, host_pages) * self.page_bytes  # a view needs at least one page
        pinned = self.device.type == "cuda" and host_pages > 0
        self.host = (
            torch.empty(host_bytes, dtype=torch.uint8, pin_memory=True)
            if pinned
            else _arena(host_bytes, torch.device("cpu"))
        )

    @property
    def group(self) -> KVCacheGroup:
        """The first group, which a model of one kind of layer has alone."""
        return self.groups[0]

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def host_nbytes(self) -> int:
        return self.host_pages * self.page_bytes

    def layouts(self) -> dict[int, KVLayout]:
        """Model layer -> where its keys and values lie inside a page of its group."""
        return {layer: layout for layer, (layout, _) in self.places().items()}

    def places(self) -> dict[int, tuple[KVLayout, int]]:
        """Model layer -> where its keys and values lie inside a page, and the number of its group."""
        return {
            spec.layer: (
                KVLayout(
                    offset,
                    group.tokens_per_page,
                    spec.num_kv_heads,
                    spec.k_head_dim,
                    spec.v_head_dim,
                    self.dtype,
                    *self._scales.get(spec.layer, (1.0, 1.0)),
                ),
                g,
            )
            for g, group in enumerate(self.groups)
            for spec, offset in zip(group.layers, group.layer_offsets, strict=True)
            if spec.kind not in STATES
        }

    def states(self) -> dict[int, StatePlace]:
        """Model layer -> where its state lies."""
        return {
            spec.layer: StatePlace(offset, g)
            for g, group in enumerate(self.groups)
            for spec, offset in zip(group.layers, group.layer_offsets, strict=True)
            if spec.kind in STATES
        }

    def swap_out(self, copies: Sequence[PageCopy]) -> None:
        self._move(self.host, self.arena, copies)

    def swap_in(self, copies: Sequence[PageCopy]) -> None:
        self._move(self.arena, self.host, copies)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        self._move(self.arena, self.arena, copies)

    def read(self, entries: Sequence[Sequence[int]]) -> bytes:
        """The bytes of these pages, per group its table entries, one after the other."""
        pieces = [self._page(g, entry) for g, group in enumerate(entries) for entry in group]
        return torch.cat(pieces).cpu().numpy().tobytes() if pieces else b""

    def write(self, entries: Sequence[Sequence[int]], data: bytes) -> None:
        """What `read` gave, into these pages. Raises ValueError where it is not of their size."""
        pages = [self._page(g, entry) for g, group in enumerate(entries) for entry in group]
        size = sum(len(page) for page in pages)
        if len(data) != size:
            raise ValueError(f"The KV that came has {len(data)} bytes, its pages have {size}.")
        if not pages:
            return
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        for page, piece in zip(pages, source.split([len(page) for page in pages]), strict=True):
            page.copy_(piece)

    def _page(self, group: int, entry: int) -> torch.Tensor:
        """uint8 [page_bytes], a view of the arena."""
        return self.arena[entry * UNIT : entry * UNIT + self.groups[group].page_bytes]

    def _move(self, target: torch.Tensor, source: torch.Tensor, copies: Sequence[PageCopy]) -> None:
        """Group by group: what one writes is no page that another still reads."""
        for g in dict.fromkeys(copy.group for copy in copies):
            pairs = [(copy.src, copy.dst) for copy in copies if copy.group == g]
            copy_pages(target, source, pairs, self.groups[g].page_bytes)


def _arena(nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes]. On a CPU from anonymous pages: zero, and real memory only once they are written."""
    if device.type == "cpu":
        memory = _private(nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a layer's KV of a page is short: most reads would miss the TLB
            with suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _private(nbytes: int) -> mmap.mmap:
    """Shared memory, Python's default, is given huge pages on few systems."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)
