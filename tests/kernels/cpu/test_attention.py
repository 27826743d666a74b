"""The C++ paged attention against the double loop, and against itself in other company."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from llmtool_kernels import attention
from llmtool_kernels.attention import AttentionBatch
from llmtool_kernels.cpu.attention import kernels_for, paged_attention_cpu
from llmtool_kernels.cpu.native import Native

from tests.kernels.gpu.pages import paged, random_tree
from tests.kernels.store import Store

CLOSE = {torch.float32: {"atol": 5e-6, "rtol": 2e-5}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}


@pytest.fixture(autouse=True)
def _seed(threads: int) -> None:
    torch.manual_seed(0)


def store_of(native: Native, *args: int, **options: object) -> Store:
    return Store(*args, run=functools.partial(paged_attention_cpu, native), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "k_dim", "v_dim", "page_tokens"),
    [(4, 4, 8, 4, 3), (6, 2, 64, 64, 16), (5, 1, 80, 48, 8), (32, 2, 16, 16, 1), (26, 1, 36, 70, 32)],
)
def test_steps_equal_the_double_loop(
    native: Native,
    q_heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int,
    page_tokens: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    """Decodes, a few tokens and long chunks in one step, over one piece of keys and over several."""
    store = store_of(
        native, kv_heads, k_dim, v_dim, page_tokens=page_tokens, dtype=dtype, num_pages=2200 // page_tokens
    )
    rng = random.Random(1)
    news = {0: 1, 1: 300, 2: 17, 3: 530 if k_dim < 40 else 260}
    for _ in range(3):
        ours, expected = store.step(news, q_heads, window)
        torch.testing.assert_close(ours, expected, **CLOSE[dtype])
        news = {s: rng.choice([1, 1, 2, 7, 23]) for s in rng.sample(range(4), rng.randint(1, 4))}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("softcap", "sinks"), [(0.7, False), (None, True), (1.5, True)])
def test_soft_capped_scores_and_sinks(
    native: Native, softcap: float | None, sinks: bool, dtype: torch.dtype
) -> None:
    store = store_of(native, 2, 8, 4, page_tokens=3, num_pages=400, dtype=dtype)
    sink = torch.randn(6) if sinks else None
    for news in ({0: 290, 1: 5}, {0: 1, 1: 1, 2: 40}):
        for window in (None, 20):
            ours, expected = store.step(news, 6, window, softcap=softcap, sinks=sink)
            torch.testing.assert_close(ours, expected, **CLOSE[dtype])


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values_may_be_the_leading_dimensions_of_the_keys(native: Native, softcap: float | None) -> None:
    store = store_of(native, 1, 40, 0, page_tokens=4, shared=32, num_pages=200)
    for news in ({0: 300, 1: 3}, {0: 1, 1: 1, 2: 9}):
        ours, expected = store.step(news, 5, None, softcap=softcap)
        torch.testing.assert_close(ours, expected, **CLOSE[torch.float32])
    written = (~store.arena.view(torch.float32).isnan()).sum()
    assert written == sum(len(k) for k in store.k.values()) * 40


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (64, 1.5), (300, None)])
@pytest.mark.parametrize(("heads", "dims"), [((4, 2), (16, 16)), ((28, 4), (32, 32)), ((5, 1), (40, 0))])
def test_a_tree_of_drafts_sees_its_ancestors_only(
    native: Native,
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Single tokens, small trees and one of 64 nodes, over one piece of keys and over several."""
    sizes = (1, 20, 7, 64, 3)
    lengths = (9, 551, 7, 290, 258)
    tree = [1, *random_tree(20), *random_tree(7, seed=1), *random_tree(64, seed=2), 1, 3, 5]
    tree = [bits if bits < 2**63 else bits - 2**64 for bits in tree]
    case = paged(sizes, lengths, heads, dims, 16, dtype, window=window, tree=tree)
    case.batch.block_tables.clamp_(max=2**20)  # in front of a window the reference reads what it then masks
    arguments = (case.q, case.k, case.v)
    extra = {"softcap": softcap, "value_dim": 24 if case.v is None else None}
    expected, ours = (
        run(*arguments, case.arena.clone(), case.layout, case.batch, 0.3, window, **extra)
        for run in (attention.paged_attention_reference, functools.partial(paged_attention_cpu, native))
    )
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])
    case.batch.tree, case.batch.tree_depth = None, 0
    causal = paged_attention_cpu(
        native, *arguments, case.arena.clone(), case.layout, case.batch, 0.3, window, **extra
    )
    assert not torch.allclose(ours, causal, atol=0.05)


def test_a_window_shorter_than_a_branch_is_not_planned(native: Native) -> None:
    case = paged((1, 3), (9, 12), tree=[1, 1, 3, 7])
    with pytest.raises(AssertionError, match="window of 2 tokens is shorter than a branch of 3"):
        paged_attention_cpu(
            native, case.q, case.k, case.v, case.arena, case.layout, case.batch, 0.3, window=2
        )


def test_a_sequence_reads_pages_another_writes_in_the_same_step(native: Native) -> None:
    store = store_of(native, 2, 8, 8, page_tokens=4)
    store.extend(0, 8)
    store.k[1], store.v[1] = store.k[0].clone(), store.v[0].clone()
    store.tables[1] = list(store.tables[0])
    total = store.extend(1, 3)
    ours, expected = store.attend([1, 0], [3, 8], [total, 8], q_heads=4, window=None)
    torch.testing.assert_close(ours, expected, **CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_a_token_is_the_same_bit_for_bit_alone_in_chunks_and_in_any_batch(
    native: Native, dtype: torch.dtype
) -> None:
    tokens, heads, dim = 600, 6, 32
    q = torch.randn(tokens, heads, dim).to(dtype)
    k, v = (torch.randn(tokens, 2, dim).to(dtype) for _ in range(2))
    results = []
    for chunks in ([600], [1] * 8 + [592], [255, 2, 343], [599, 1], [400, 50, 50, 50, 50]):
        store = store_of(native, 2, dim, dim, page_tokens=16, dtype=dtype, num_pages=100)
        store.step({7: 50}, heads, None)
        store.extend(0, tokens)
        out, start = [], 0
        for n in chunks:
            others = [(7, 3)] if len(chunks) % 2 else []
            lens, totals = [n, *(m for _, m in others)], [start + n, *(50 for _ in others)]
            tables = [store.tables[0], *(store.tables[s] for s, _ in others)]
            batch = AttentionBatch.build(lens, totals, tables, 16)
            pad = torch.zeros(sum(lens) - n, heads, dim, dtype=dtype)
            parts = [torch.cat((t[start : start + n], pad[:, : t.shape[1]])) for t in (q, k, v)]
            got = paged_attention_cpu(native, *parts, store.arena, store.layout, batch, 0.2)
            out.append(got[:n])
            start += n
        results.append(torch.cat(out))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_public_entry_takes_it(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtool_kernels.cpu.attention.kernels", lambda: native)
    monkeypatch.setattr(attention, "paged_attention_reference", None)
    store = Store(2, 8, 8, page_tokens=4, run=attention.paged_attention)
    ours, expected = store.step({0: 9, 1: 1}, 4, None)
    torch.testing.assert_close(ours, expected, **CLOSE[torch.float32])
    odd = torch.randn(3, 2, 7)
    assert kernels_for(odd, odd, odd) is None
    assert kernels_for(*(torch.randn(3, 2, 8, dtype=torch.float16),) * 3) is None
    assert kernels_for(*(torch.randn(2, 3, 8).transpose(0, 1),) * 3) is None
