from __future__ import annotations

import mmap
import resource

import pytest
import torch

from llmtool.core.memory.geometry import UNIT, LayerCacheSpec, uniform_group
from llmtool.core.ports import PageCopy
from llmtool.runtime.kv_store import KVStore

GROUP = uniform_group([LayerCacheSpec(layer, 2, 8, 8, 4) for layer in (0, 1)], 4)
UNITS = GROUP.page_units


def fill(store: KVStore) -> torch.Tensor:
    """Random bytes everywhere; returns the device pages [P, bytes] as they were."""
    for arena in (store.arena, store.host):
        arena.copy_(torch.randint(0, 256, arena.shape, dtype=torch.uint8))
    return pages(store.arena).clone()


def pages(arena: torch.Tensor) -> torch.Tensor:
    return arena.view(-1, GROUP.page_bytes)


def test_sizes_and_layouts() -> None:
    store = KVStore(GROUP, num_pages=5, host_pages=3)
    assert store.nbytes == store.arena.numel() == 5 * GROUP.page_bytes
    assert store.host_nbytes == store.host.numel() == 3 * GROUP.page_bytes
    assert GROUP.page_bytes % UNIT == 0
    layouts = store.layouts()
    assert [layouts[layer].layer_offset for layer in (0, 1)] == [0, 4 * 2 * 16 * 4]
    assert (layouts[1].tokens_per_page, layouts[1].num_kv_heads, layouts[1].k_head_dim) == (4, 2, 8)


def test_pages_move_between_the_arenas() -> None:
    store = KVStore(GROUP, num_pages=6, host_pages=4)
    before = fill(store)
    store.swap_out([PageCopy(5 * UNITS, 0), PageCopy(2 * UNITS, 3 * UNITS)])
    assert torch.equal(pages(store.arena), before)
    assert torch.equal(pages(store.host)[[0, 3]], before[[5, 2]])
    store.arena.zero_()
    store.swap_in([PageCopy(3 * UNITS, 1 * UNITS), PageCopy(0, 4 * UNITS)])
    assert torch.equal(pages(store.arena)[[1, 4]], before[[2, 5]])
    assert not pages(store.arena)[[0, 2, 3, 5]].any()


def test_copies_happen_as_if_at_once() -> None:
    store = KVStore(GROUP, num_pages=4)
    before = fill(store)
    store.copy([PageCopy(0, UNITS), PageCopy(UNITS, 2 * UNITS)])
    assert torch.equal(pages(store.arena), before[[0, 0, 1, 3]])
    store.copy([])
    assert torch.equal(pages(store.arena), before[[0, 0, 1, 3]])


def test_memory_on_a_cpu_is_zero_and_taken_only_when_written() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = KVStore(GROUP, num_pages=2**33 // GROUP.page_bytes)  # 8 GiB
    assert store.nbytes == 2**33
    assert not store.arena[-4096:].any()
    store.arena[:4096] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Plain)
    assert not KVStore(GROUP, num_pages=2).arena.any()


def test_pages_read_here_are_written_there() -> None:
    """Into other places, and of several sizes; what does not fit them is refused."""
    attention = [LayerCacheSpec(i, 2, 8, 8, 4) for i in range(2)]
    states = [LayerCacheSpec(2, 0, 0, 0, 4, "recurrent", state_bytes=700)]
    groups = [uniform_group(attention, 4), uniform_group(states, 4, "states")]
    size = groups[0].page_bytes * 4
    here, there = (KVStore(groups, 8, page_bytes=size) for _ in range(2))
    here.arena.copy_(torch.randint(256, here.arena.shape, dtype=torch.uint8))
    unit = groups[0].page_units
    mine, theirs = [[0, 3 * unit], [8 * unit]], [[5 * unit, 4 * unit], [0]]
    data = here.read(mine)
    assert len(data) == 2 * groups[0].page_bytes + groups[1].page_bytes
    there.write(theirs, data)
    for g, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(here._page(g, x), there._page(g, y))
    assert there.read(theirs) == data and here.read([[], []]) == b""
    with pytest.raises(ValueError, match="its pages have"):
        there.write(theirs, data[:-1])
