"""Paged attention against a double loop over queries and heads, on an arena that starts out as NaN."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from llmtool_kernels import attention
from llmtool_kernels.attention import (
    UNIT,
    copy_pages,
    page_rows,
)
from llmtool_kernels.attention_plan import MAX_BUCKET_TOKENS, plan_step

from llmtool.core.memory import geometry
from tests.kernels.store import Store


def test_unit_is_the_allocators() -> None:
    assert UNIT == geometry.UNIT


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("page_tokens", [1, 3, 16])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_continuous_batching_equals_the_double_loop(
    q_heads: int, kv_heads: int, page_tokens: int, window: int | None
) -> None:
    """Prompts in chunks of random size, decodes and both in one step, over pages in random places."""
    store = Store(kv_heads, k_dim=8, v_dim=4, page_tokens=page_tokens, num_pages=300)
    rng = random.Random(1)
    for _ in range(8):
        chosen = rng.sample(range(6), rng.randint(1, 6))
        ours, expected = store.step({s: rng.choice([1, 1, 1, 2, 7, 17]) for s in chosen}, q_heads, window)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("softcap", "sinks"), [(0.7, False), (None, True), (1.5, True)])
def test_soft_capped_scores_and_sinks(
    softcap: float | None, sinks: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores' memory is bounded to few rows at a time, so that chunks are cut too."""
    monkeypatch.setattr(attention, "MAX_SCORES", 500)
    store = Store(2, k_dim=8, v_dim=4, page_tokens=3, num_pages=300)
    sink = torch.randn(6) if sinks else None
    rng = random.Random(1)
    for _ in range(6):
        chosen = rng.sample(range(6), rng.randint(1, 6))
        news = {s: rng.choice([1, 1, 2, 7, 37]) for s in chosen}
        ours, expected = store.step(news, 6, window, softcap=softcap, sinks=sink)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values_may_be_the_leading_dimensions_of_the_keys(softcap: float | None) -> None:
    """Latent attention: one row a token, half the memory, whatever lies behind it untouched."""
    store = Store(1, k_dim=12, v_dim=0, page_tokens=4, shared=8, num_pages=60)
    rng = random.Random(4)
    for _ in range(5):
        news = {s: rng.choice([1, 1, 6]) for s in range(4)}
        ours, expected = store.step(news, 5, None, softcap=softcap)
        assert ours.shape[1:] == (5, 8)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
    written = (~store.arena.view(torch.float32).isnan()).sum()
    assert written == sum(len(k) for k in store.k.values()) * 12


def test_half_precision() -> None:
    store = Store(2, 16, 16, page_tokens=4, dtype=torch.bfloat16)
    for news in ({0: 9, 1: 1}, {0: 1, 1: 1}, {0: 5, 1: 1}):
        ours, expected = store.step(news, q_heads=4, window=None)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, expected, atol=0.03, rtol=0.03)


def test_a_sequence_reads_pages_another_writes_in_the_same_step() -> None:
    """Prefix sharing inside a step: the follower comes first in the batch, and has no KV of its own prefix."""
    store = Store(2, 8, 8, page_tokens=4)
    store.extend(0, 8)
    store.k[1], store.v[1] = store.k[0].clone(), store.v[0].clone()
    store.tables[1] = list(store.tables[0])
    total = store.extend(1, 3)
    ours, expected = store.attend([1, 0], [3, 8], [total, 8], q_heads=4, window=None)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_garbage_in_other_pages_and_slots_is_never_seen() -> None:
    """Uneven decodes share a bucket, so padding is really gathered; every slot not written holds NaN."""
    store = Store(1, 8, 8, page_tokens=8, num_pages=200)
    store.step({s: 60 + s for s in range(9)}, 2, None)
    ours, expected = store.step(dict.fromkeys(range(9), 1), 2, None)
    assert not ours.isnan().any()
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
    assert store.arena.view(torch.float32).isnan().any()


def test_a_layer_stays_inside_its_part_of_its_pages() -> None:
    store = Store(2, 8, 4, page_tokens=3, layers=3, num_pages=8)
    before = store.arena.clone()
    store.step({0: 7}, 4, None)
    changed = (store.arena != before).nonzero().flatten()
    size = store.page_tokens * 2 * 12 * 4
    allowed = [
        (unit * UNIT + size, unit * UNIT + size + size) for unit in store.tables[0]
    ]  # the second of three layers
    assert len(changed)
    assert all(any(a <= byte < b for a, b in allowed) for byte in changed.tolist())
    k_pages, v_pages = page_rows(store.arena, store.layout, torch.float32)
    first = store.tables[0][0]
    assert torch.equal(k_pages[first].view(3, 2, 8), store.k[0][:3])
    assert torch.equal(v_pages[first].view(3, 2, 4), store.v[0][:3])


def test_the_last_page_of_the_arena_is_reachable() -> None:
    store = Store(1, 8, 8, page_tokens=16, layers=2, num_pages=3)
    store.free.sort()  # the highest page goes first
    ours, expected = store.step({0: 5}, 2, None)
    assert store.tables[0] == [2 * store.page_bytes // UNIT]
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_buckets_hold_every_decode_once_with_little_padding() -> None:
    rng = random.Random(3)
    lengths = [rng.choice([1, 30, 31, 700, 701, 5000]) for _ in range(100)] + [60000]
    tables = torch.zeros(len(lengths), 60000 // 16 + 1, dtype=torch.int32)
    work = plan_step([1] * len(lengths), lengths, tables, None, 16, torch.float32)
    assert sorted(row for w in work for row in w.rows.tolist()) == list(range(len(lengths)))
    for w in work:
        own = [lengths[row] for row in w.rows.tolist()]
        assert w.length == max(own)
        assert w.num_seqs * w.padded_len <= max(MAX_BUCKET_TOKENS, w.padded_len)
        assert w.num_seqs * w.padded_len <= 1.25 * sum(own) + 32 * len(own)
    assert len(work) < 60


def test_windows_read_only_the_pages_they_reach() -> None:
    tables = torch.arange(100, dtype=torch.int32)[None]
    (decode,) = plan_step([1], [1000], tables, 20, 10, torch.float32)
    assert decode.units.tolist() == [[98, 99]]
    (chunk,) = plan_step([15], [1000], tables, 20, 10, torch.float32)
    assert chunk.units.tolist() == [[96, 97, 98, 99]]


def test_copies_happen_as_if_all_at_once() -> None:
    page = 2 * UNIT
    arena = torch.arange(6, dtype=torch.uint8).repeat_interleave(page)
    copy_pages(arena, arena, [(0, 2), (2, 4), (4, 0)], page)
    assert arena.view(6, page)[:, 0].tolist() == [2, 0, 1, 3, 4, 5]
    assert all(row.unique().numel() == 1 for row in arena.view(6, page))


def test_copies_between_arenas_start_at_any_unit() -> None:
    page = 3 * UNIT
    host = torch.zeros(4 * page, dtype=torch.uint8)
    device = torch.randint(0, 256, (5 * page,), dtype=torch.uint8)
    copy_pages(host, device, [(1, 9), (12, 0)], page)
    units, source = host.view(-1, UNIT), device.view(-1, UNIT)
    assert torch.equal(units[9:12], source[1:4])
    assert torch.equal(units[:3], source[12:15])
    assert not units[3:9].any()
    copy_pages(host, device, [], page)
