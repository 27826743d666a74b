"""The attention kernel against the torch reference: every branch, with tiles and steps small enough to be many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from llmtool_kernels.attention import AttentionBatch, paged_attention
from llmtool_kernels.gpu import attention, table
from llmtool_kernels.gpu.attention import read_pages

from tests.kernels.gpu.pages import Paged, paged, random_tree

MIXED = ((1, 1, 5, 20), (7, 33, 18, 20))  # two decodes, a verification, a prompt: new tokens, lengths
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
}


def small(
    monkeypatch: pytest.MonkeyPatch, phases: bool = False, block_m: int = 16, block_n: int = 16
) -> None:
    """Tiles that the test's few tokens fill more than once."""
    config = table.Config(block_m, block_n, 4, 2, 1, phases)
    monkeypatch.setattr(table, "choose", lambda *_: config)


def check(case: Paged, scale: float = 0.3, value_dim: int | None = None, **extra: Any) -> torch.Tensor:
    expected = paged_attention(
        case.q.cpu(),
        case.k.cpu(),
        None if case.v is None else case.v.cpu(),
        case.arena.cpu(),
        case.layout,
        on_cpu(case.batch),
        scale,
        value_dim=value_dim,
        **{name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in extra.items()},
    )
    ours = read_pages(case.q, case.arena, case.layout, case.batch, scale, value_dim=value_dim, **extra)
    torch.testing.assert_close(ours.cpu(), expected, **CLOSE[case.q.dtype])
    for works in case.batch._plans.values():
        assert all((work.counters == 0).all() for work in works)
    return ours


def on_cpu(batch: AttentionBatch) -> AttentionBatch:
    tensors = (batch.query_start, batch.seq_lens, batch.block_tables, batch.token_units, batch.token_slots)
    tree = None if batch.tree is None else batch.tree.cpu()
    return AttentionBatch(
        *(t.cpu() for t in tensors), batch.query_lens, batch.kv_lens, tree, batch.tree_depth
    )


@pytest.mark.parametrize("phases", [False, True])
@pytest.mark.parametrize("window", [None, 5, 18])
def test_decodes_verification_and_prompts_in_one_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, phases: bool, window: int | None
) -> None:
    small(monkeypatch, phases)
    check(paged(*MIXED, device=device, window=window), window=window)


@pytest.mark.parametrize("group", [1, 3, 20])
def test_any_number_of_query_heads_a_kv_head(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """Also more than a tile has rows, and numbers that do not divide them."""
    small(monkeypatch)
    check(paged((1, 3), (20, 9), heads=(group, 1), device=device))


@pytest.mark.parametrize(
    ("dims", "value_dim"), [((24, 8), None), ((8, 40), None), ((48, 0), 32), ((24, 0), 8)]
)
def test_head_dimensions_that_are_no_powers_of_two(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dims: tuple[int, int], value_dim: int | None
) -> None:
    """Latent attention's too, whose values are the keys' first part or less."""
    small(monkeypatch)
    check(paged((1, 4), (37, 21), heads=(3, 1), dims=dims, device=device), value_dim=value_dim)


@pytest.mark.parametrize(("softcap", "sinks"), [(0.7, False), (None, True), (1.5, True)])
def test_soft_capped_scores_and_sinks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, softcap: float | None, sinks: bool
) -> None:
    small(monkeypatch)
    sink = torch.randn(4, device=device) if sinks else None
    check(paged((1, 2), (70, 9), device=device), softcap=softcap, sinks=sink)


@pytest.mark.parametrize(("window", "phases"), [(None, False), (20, False), (20, True)])
def test_a_tree_of_drafts_sees_its_ancestors_only(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, window: int | None, phases: bool
) -> None:
    small(monkeypatch, phases)
    tree = [1, *random_tree(20), *random_tree(7, seed=1)]
    case = paged((1, 20, 7), (9, 51, 7), device=device, window=window, tree=tree)
    ours = check(case, window=window)
    case.batch.tree, case.batch.tree_depth = None, 0
    case.batch._plans.clear()
    causal = read_pages(case.q, case.arena, case.layout, case.batch, 0.3, window)
    assert not torch.allclose(ours, causal, atol=1e-3)


@pytest.mark.parametrize("tokens_per_page", [1, 3, 16])
def test_pages_of_any_size_and_stride(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tokens_per_page: int
) -> None:
    """A layer's pages as a strided view of larger ones, which hold other layers' NaN before and behind it."""
    small(monkeypatch)
    case = paged((1, 6), (40, 17), tokens_per_page=tokens_per_page, padding=3000, offset=1792, device=device)
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    small(monkeypatch)
    assert check(paged(*MIXED, dtype=dtype, device=device)).dtype == dtype


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_in_eight_bits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: torch.dtype
) -> None:
    """Heads that are no power of two, a window, soft caps and scales; and a tile in parts, so that parts add up."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("the device has no float8")
    small(monkeypatch)
    case = paged((*MIXED[0], 1), (*MIXED[1], 90), dims=(24, 40), dtype=dtype, device=device, window=30,
                 stored=stored, scales=(0.37, 1.9))  # fmt: skip
    assert check(case, window=30, softcap=2.0).dtype == dtype


def test_latent_keys_in_eight_bits_have_one_scale(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    case = paged((1, 4), (37, 21), heads=(3, 1), dims=(48, 0), device=device,
                 stored=torch.float8_e4m3fn, scales=(0.25, 77.0))  # fmt: skip
    check(case, value_dim=32)


def test_a_window_shorter_than_a_branch_is_not_planned(device: torch.device) -> None:
    case = paged((1, 3), (9, 12), device=device, tree=[1, 1, 3, 7])
    with pytest.raises(AssertionError, match="window of 2 tokens is shorter than a branch of 3"):
        read_pages(case.q, case.arena, case.layout, case.batch, 0.3, window=2)
    read_pages(case.q, case.arena, case.layout, case.batch, 0.3, window=3)


def test_queries_cut_from_a_fused_projection(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    case = paged((1, 3), (20, 9), device=device)
    fused = torch.randn(4, 4 * 16 + 64, device=device)
    fused[:, :64] = case.q.flatten(1)
    q = fused[:, :64].unflatten(1, (4, 16))
    assert not q.is_contiguous()
    ours = read_pages(q, case.arena, case.layout, case.batch, 0.3)
    torch.testing.assert_close(ours, check(case))


def test_configurations_of_the_table(device: torch.device) -> None:
    """Both launches of a step, as served: narrow tiles for the decode, wide ones for the prompt."""
    case = paged((1, 70), (9, 70), heads=(2, 2), dtype=torch.bfloat16, device=device)
    check(case)
    (works,) = case.batch._plans.values()
    assert [work.chosen for work in works] == [(0,), (1,)]


def test_layers_share_a_plan_and_it_can_be_refreshed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a captured graph needs: the same device memory, other lengths."""
    small(monkeypatch)
    case = paged((1, 1), (50, 21), device=device)
    first = attention.plan(case.q, case.layout, case.batch, None, None)
    assert attention.plan(case.q, case.layout, case.batch, None, None) is first
    shorter: Sequence[int] = (31, 2)
    for work in first:
        work.refresh((1, 1), shorter)
    ours = read_pages(case.q, case.arena, case.layout, case.batch, 0.3)
    batch = on_cpu(case.batch)
    batch.kv_lens = shorter
    again = AttentionBatch(
        batch.query_start, torch.tensor(shorter, dtype=torch.int32), batch.block_tables,
        batch.token_units, batch.token_slots, (1, 1), shorter,
    )  # fmt: skip
    expected = read_pages_reference(case, again)
    torch.testing.assert_close(ours.cpu(), expected, **CLOSE[torch.float32])


def read_pages_reference(case: Paged, batch: AttentionBatch) -> torch.Tensor:
    """The reference writes before it reads: the keys and values that lie there already."""
    from llmtool_kernels.attention import page_rows

    arena = case.arena.cpu()
    k_pages, v_pages = page_rows(arena, case.layout, case.q.dtype)
    t = case.layout.tokens_per_page
    last = [length - 1 for length in batch.kv_lens]
    units = torch.stack([batch.block_tables[s, p // t].long() for s, p in enumerate(last)])
    slots = torch.tensor([p % t for p in last])
    batch.token_units, batch.token_slots = units, slots
    k, v = (pages.unflatten(1, (t, 2, -1))[units, slots] for pages in (k_pages, v_pages))
    return paged_attention(case.q.cpu(), k, v, arena, case.layout, batch, 0.3)
