from __future__ import annotations

from typing import Any

import pytest

from llmtool.config import EngineConfig
from llmtool.core.memory.geometry import LayerCacheSpec, uniform_group
from llmtool.errors import InfeasibleError, UsageError
from llmtool.modelspec import ModelSpec
from llmtool.runtime.budget import KVBudget, kv_budget
from llmtool.runtime.device import DeviceMemory
from tests.modelspec.published import LLAMA_31_8B

GB = 2**30
PAGE = 16 * 4096
GROUP = uniform_group([LayerCacheSpec(0, 8, 128, 128, 2)], 16)  # 4096 bytes a token
assert GROUP.page_bytes == PAGE


def budget(
    *, total: int = 16 * GB, free: int = 8 * GB, cpu: bool = True, model_len: int = 4096, **config: Any
) -> KVBudget:
    engine = EngineConfig(**({"max_num_seqs": 8} | config))
    return kv_budget(engine, GROUP, model_len, DeviceMemory(total, free), GB, cpu, host_free=2 * GB)


def test_cpu_takes_what_full_sequences_need() -> None:
    assert budget() == KVBudget(num_pages=8 * 4096 // 16, host_pages=0, max_model_len=4096)
    assert budget(max_model_len=100).num_pages == 8 * 7


def test_cpu_takes_at_most_a_quarter_of_what_is_free() -> None:
    assert budget(free=4 * 100 * PAGE + 3) == KVBudget(100, 0, 1600)


def test_gpu_takes_what_the_utilization_leaves() -> None:
    # Half of 16 GiB, of which 2 are taken by the weights and 1 is for activations.
    got = budget(cpu=False, free=14 * GB, gpu_memory_utilization=0.5)
    assert got == KVBudget(5 * GB // PAGE, 0, 4096)


def test_eight_bits_hold_twice_the_tokens() -> None:
    spec = ModelSpec.from_config(LLAMA_31_8B)
    halves = [uniform_group(spec.layer_cache_specs(size), 16) for size in (2, 1)]
    assert halves[0].bytes_per_token == 2 * halves[1].bytes_per_token == 2 * 32 * 2 * 8 * 128
    room = EngineConfig(kv_cache_memory_bytes=GB, max_num_seqs=8)
    pages = [
        kv_budget(room, g, 8192, DeviceMemory(80 * GB, 80 * GB), GB, False, GB).num_pages for g in halves
    ]
    assert pages[1] == 2 * pages[0] > 0


def test_exact_bytes_win() -> None:
    assert budget(kv_cache_memory_bytes=99 * PAGE + 1, max_model_len=16).num_pages == 99
    assert budget(kv_cache_memory_bytes=99 * PAGE, cpu=False).num_pages == 99


def test_the_context_is_shortened_to_what_fits_unless_it_was_asked_for() -> None:
    assert budget(kv_cache_memory_bytes=20 * PAGE).max_model_len == 320
    with pytest.raises(InfeasibleError, match="321 tokens") as error:
        budget(kv_cache_memory_bytes=20 * PAGE, max_model_len=321)
    assert "--max-model-len to 320" in error.value.remedy
    assert budget(kv_cache_memory_bytes=20 * PAGE, max_model_len=320).max_model_len == 320


def test_a_page_for_each_sequence() -> None:
    with pytest.raises(InfeasibleError, match=r"7 pages of 64\.0 KiB.* 8 sequences"):
        budget(kv_cache_memory_bytes=7 * PAGE)


def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(InfeasibleError, match=r"9\.0 GiB.*8\.0 GiB"):
        budget(kv_cache_memory_bytes=9 * GB)
    with pytest.raises(InfeasibleError, match="nothing is left"):
        budget(cpu=False, free=2 * GB)


def test_swap_space() -> None:
    assert budget(swap_space_bytes=10 * PAGE + 5).host_pages == 10
    with pytest.raises(InfeasibleError, match="swap_space_bytes"):
        budget(swap_space_bytes=3 * GB)


def test_pages_and_swapped_pages_share_a_cpu_s_memory() -> None:
    # 2 GiB in all, 1 for activations: 0.75 for pages leave a quarter for swapping.
    kv = {"kv_cache_memory_bytes": 3 * GB // 4, "max_model_len": 16}
    assert budget(**kv, swap_space_bytes=GB // 4).host_pages == GB // 4 // PAGE
    with pytest.raises(InfeasibleError, match=r"256\.0 MiB of memory are left"):
        budget(**kv, swap_space_bytes=GB // 4 + 1)
    assert budget(**kv, swap_space_bytes=2 * GB, cpu=False).host_pages == 2 * GB // PAGE


def test_the_model_s_own_limit_holds() -> None:
    with pytest.raises(UsageError, match="made for 4096"):
        budget(max_model_len=4097)


def test_table_entries_fit_an_int32() -> None:
    got = budget(total=2**42, free=2**42, cpu=False)
    assert got.num_pages * GROUP.page_units <= 2**31
    assert got.num_pages == 2**40 // PAGE
