"""Tables of what a sequence takes: equal to the page plan, length by length, and to what the arena lets in."""

import numpy as np
import pytest

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.arena import Arena
from llmtool.core.memory.page_plan import plan_pages
from llmtool.errors import InfeasibleError, UsageError
from llmtool.memprofile.bill import itemise
from llmtool.memprofile.demand import ALLOCATORS, PLANS, demand, demands
from llmtool.memprofile.setting import Setting
from llmtool.modelspec.catalogue import read_config
from llmtool.sim.ir import read_ir

MODELS = (
    "llama-3.1-8b",
    "gemma-3-27b",
    "llama-4-scout",
    "falcon-h1-1.5b",
    "llama-3.2-11b-vision",
    "lfm2-1.2b",
)
LENGTHS = (1, 15, 16, 17, 1023, 1024, 1025, 4097, 8192, 8193, 12000)


def setting(name: str, **changes: object) -> Setting:
    values = {"card": 400 << 30, "max_len": 12288, "image": 1601, **changes}
    ir = read_ir(read_config(name), name)
    return Setting(ir, **{**values, "max_len": min(ir.max_positions, int(values["max_len"]))})  # type: ignore


@pytest.mark.parametrize("name", MODELS)
def test_tables_equal_the_page_plan(name: str) -> None:
    s = setting(name)
    found, refused = demands(ALLOCATORS, s, 40 << 30, 4000)
    assert set(found) | set(refused) == set(ALLOCATORS) and set(refused) <= {"lcm"}
    types = s.geometry.types()
    for allocator, d in found.items():
        for n in LENGTHS:
            live = [t.live_bytes(n, s.image) for t in types]
            assert d.live[:, n].tolist() == live and d.names == tuple(t.name for t in types)
            assert (d.by_type[:, n] >= d.live[:, n]).all()
            if allocator == "contiguous":
                whole = sum(
                    len(t.layers) * t.spec.bytes_per_token * (s.image if "cross" in t.name else s.max_len)
                    + len(t.layers) * t.spec.state_bytes
                    for t in types
                )
                assert d.table[0, n] == whole
                continue
            plan = plan_pages(s.geometry, 16, mode=PLANS[allocator], expected_tokens=4000)
            if allocator == "static":
                takes = [pool.small_pages(n, s.image) * pool.stride for pool in plan.pools]
                assert d.table[:, n].tolist() == takes == d.by_type[:, n].tolist()
                assert (d.capacity <= [(40 << 30) * pool.share for pool in plan.pools]).all()
            else:
                assert d.table[0, n] == plan.allocated_bytes(n, s.image) == d.by_type[:, n].sum()
                assert d.arena <= 40 << 30


@pytest.mark.parametrize("name", ["gemma-3-27b", "falcon-h1-1.5b", "jamba-1.5-mini"])
@pytest.mark.parametrize("allocator", ["max", "near"])
def test_as_many_fit_as_the_arena_lets_in(name: str, allocator: str) -> None:
    s, length = setting(name, image=0), 3000
    d = demand(allocator, s, 6 << 30, length)
    assert d.plan is not None
    arena = Arena.of(d.plan, d.arena // d.plan.large_page)
    count = 0
    try:
        while True:
            arena.take([pool.small_pages(length) for pool in d.plan.pools], f"r{count}")
            count += 1
    except OutOfPages:
        pass
    # The arena may put the last one into corners of others' large pages, which the count does not.
    assert d.fits(length) <= count <= d.fits(length) + 1


def test_a_bill_sums_to_what_the_plan_allocates() -> None:
    for name in MODELS:
        geometry = setting(name).geometry
        for mode in ("near", "max"):
            plan = plan_pages(geometry, mode=mode)  # type: ignore[arg-type]
            for n in LENGTHS:
                items = itemise(plan, n, 1601)
                assert sum(i.taken for i in items) == plan.allocated_bytes(n, 1601)
                assert sum(i.live for i in items) == geometry.live_bytes(n, 1601)
                for i in items:
                    assert i.live + i.outside + i.padding == i.taken
                    assert min(i.live, i.outside, i.padding) >= 0


def test_what_a_cached_prefix_costs() -> None:
    near = demand("near", setting("gemma-3-27b"), 40 << 30, 4000)
    assert near.share[0] == pytest.approx(10 * 8192, rel=0.02) and near.window_tokens == 1024
    assert near.window[0] == pytest.approx(52 * 8192, rel=0.02) and not near.state.any()
    falcon = demand("near", setting("falcon-h1-1.5b"), 40 << 30, 4000)
    assert falcon.state[0] == pytest.approx(24 * 3_167_232, rel=0.02) and falcon.window_tokens == 0
    assert not demand("paged", setting("falcon-h1-1.5b"), 40 << 30, 4000).reusable
    paged = demand("paged", setting("gemma-3-27b"), 40 << 30, 4000)
    assert paged.reusable and paged.share[0] == 62 * 8192 and paged.alive == pytest.approx(10 / 62)


def test_tensor_parallelism_and_fp8_halve_what_they_cut() -> None:
    one, two = setting("falcon-h1-1.5b"), setting("falcon-h1-1.5b", tp=2)
    assert two.geometry.live_bytes(5000) * 2 == one.geometry.live_bytes(5000)
    narrow = setting("falcon-h1-1.5b", kv_dtype="fp8").geometry
    states = 24 * 3_167_232
    assert (narrow.live_bytes(5000) - states) * 2 == one.geometry.live_bytes(5000) - states


def test_bad_input_is_named() -> None:
    s = setting("falcon-h1-1.5b")
    with pytest.raises(UsageError, match="no allocator"):
        demand("best", s, 1 << 30, 100)
    with pytest.raises(InfeasibleError, match="least common multiple"):
        demand("lcm", s, 1 << 30, 100)
    for changes, says in (
        ({"kv_dtype": "fp3"}, "kv_dtype"),
        ({"utilization": 0.0}, "utilization"),
        ({"tp": 3}, "divide"),
        ({"page": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=says):
            setting("falcon-h1-1.5b", **changes)
    with pytest.raises(UsageError, match="131072"):
        Setting(s.ir, 1 << 30, max_len=1 << 20)
    assert np.array_equal(demand("near", s, 1 << 30, 1).table, demand("near", s, 1 << 30, 9999).table)
