"""Page plans: the published waste figures by our own code, bounds of the search, and a count page by page."""

import pytest

from llmtool.core.memory.geometry import UNIT, LayerCacheSpec
from llmtool.core.memory.model import ModelGeometry, build, rows, states
from llmtool.core.memory.page_plan import LCM_LIMIT, MAX_PAGE, MODES, PagePlan, plan_pages
from llmtool.errors import InfeasibleError, ModelError, UsageError
from llmtool.modelspec import ModelSpec
from llmtool.modelspec.catalogue import names
from llmtool.sim.catalogue import geometry_of


@pytest.mark.parametrize(
    "model,text,image,waste",
    [
        ("llama-3.2-11b-vision", 43, 6193, 0.796),
        ("gemma-2-9b", 8192, 0, 0.25),
        ("ministral-8b", 131072, 0, 0.5625),
    ],
)
def test_waste_of_uniform_pages_is_as_published(model: str, text: int, image: int, waste: float) -> None:
    # Jenga's figures for a uniform page, without the rounding of the last page: pages of one token.
    plan = plan_pages(geometry_of(model), 1, mode="uniform")
    assert plan.waste(text, image) == pytest.approx(waste, abs=5e-4)


def count_pages(plan: PagePlan, text: int, image: int) -> int:
    """Large pages of one request, position by position."""
    large = 0
    for pool in plan.pools:
        small = 0
        for group in pool.groups:
            spec, size = pool.type.spec, pool.tokens_per_page
            end = image if spec.kind == "cross_attention" else text
            seen = range(end)
            if spec.kind == "sliding_window" and spec.window is not None:
                seen = range(max(0, end - spec.window), end)
            elif spec.kind == "chunked" and spec.chunk is not None:
                seen = range((end - 1) // spec.chunk * spec.chunk, end)
            small += 1 if pool.type.is_state else len({position // size for position in seen})
            assert group.page_bytes >= sum(spec.bytes_for(size) for spec in group.layers)
        large += -(-small // pool.per_large)
    return large


@pytest.mark.parametrize("name", ["gemma-3-27b", "llama-4-scout", "lfm2-1.2b", "llama-3.2-11b-vision"])
@pytest.mark.parametrize("mode", ["lcm", "near", "max"])
def test_allocated_bytes_equal_a_count_page_by_page(name: str, mode: str) -> None:
    plan = plan_pages(geometry_of(name), mode=mode)  # type: ignore[arg-type]
    for text, image in ((1, 1), (17, 30), (1025, 1601), (8193, 0), (9000, 6404)):
        assert plan.allocated_bytes(text, image) == count_pages(plan, text, image) * plan.large_page
        assert 0 <= plan.waste(text, image) < 1


@pytest.mark.parametrize("name", sorted(names()))
def test_near_keeps_its_bounds(name: str) -> None:
    geometry = geometry_of(name)
    plan = plan_pages(geometry)
    assert plan is plan_pages(geometry), "cached"
    assert plan.large_page <= MAX_PAGE and plan.large_page % UNIT == 0
    layers = [spec for group in plan.groups for spec in group.layers]
    assert sorted(layers, key=repr) == sorted((s for s in geometry.layers if s.kind != "shared"), key=repr)
    for pool in plan.pools:
        assert pool.stride * pool.per_large <= plan.large_page and pool.stride % UNIT == 0
        assert len({group.page_bytes for group in pool.groups}) == 1
    for length in (1024, 8192, 32768, 131072):
        assert plan.waste(length, 6404) <= (0.025 if length < 8192 else 0.02), length
    assert geometry.name in plan.explain() and "large page" in plan.explain()


def test_lcm_divides_and_is_refused_above_its_limit() -> None:
    plan = plan_pages(geometry_of("ministral-8b"), mode="lcm")
    assert all(plan.large_page == pool.per_large * pool.stride for pool in plan.pools)
    assert [len(pool.groups) for pool in plan.pools] == [1, 1]
    refused = 0
    for name in names():
        try:
            assert plan_pages(geometry_of(name), mode="lcm").large_page <= LCM_LIMIT
        except InfeasibleError as error:
            assert name in error.message and "near" in error.remedy
            refused += 1
    assert refused > 0
    with pytest.raises(InfeasibleError, match="falcon-h1"):
        plan_pages(geometry_of("falcon-h1-1.5b"), mode="lcm")


def test_static_split_is_exact_where_it_was_made_and_poor_elsewhere() -> None:
    geometry = geometry_of("gemma-2-9b")
    plan = plan_pages(geometry, mode="static", expected_tokens=8192)
    assert plan.waste(8192) == pytest.approx(0, abs=1e-6)
    assert plan.waste(131072) > 0.3
    assert sum(pool.share for pool in plan.pools) == pytest.approx(1)


def test_types_of_a_geometry() -> None:
    geometry = build(
        "mixed",
        rows("full", 2, 64),
        rows("sliding_window", 3, 64, 8),
        rows("shared", 1, 64),
        rows("full", 1, 128),
    )
    assert [(t.name, len(t.layers)) for t in geometry.types()] == [
        ("full", 2),
        ("sliding_window", 3),
        ("full-2", 1),
    ]
    assert geometry.live_bytes(10) == 2 * 640 + 3 * 8 * 64 + 1280
    both = geometry.with_draft(build("small", rows("full", 1, 32)))
    assert both.types()[-1].name == "draft" and len({spec.layer for spec in both.layers}) == 8
    assert both.live_bytes(10) == geometry.live_bytes(10) + 320
    hybrid = build("hybrid", rows("full", 1, 64), states("recurrent", 2, 1000))
    assert hybrid.live_bytes(1) == 64 + 2000 and hybrid.live_bytes(100) == 6400 + 2000
    assert build("chunks", rows("chunked", 1, 64, 8)).live_bytes(17) == 64


def test_a_geometry_from_a_model_spec() -> None:
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 32,
        "max_position_embeddings": 256,
    }
    geometry = ModelGeometry.from_spec(ModelSpec.from_config(config), 4)
    (kind,) = geometry.types()
    assert (kind.name, len(kind.layers), kind.spec.window) == ("sliding_window", 3, 32)
    assert geometry.live_bytes(100) == 3 * 32 * 2 * 32 * 4


def test_bad_input_is_named() -> None:
    with pytest.raises(UsageError, match="kind 'rwkv'"):
        LayerCacheSpec(3, 1, 8, 8, 2, "rwkv")
    with pytest.raises(UsageError, match="state of 0"):
        LayerCacheSpec(3, 0, 0, 0, 2, "recurrent")
    with pytest.raises(UsageError, match="window of 0"):
        LayerCacheSpec(3, 1, 8, 8, 2, "sliding_window", window=0)
    with pytest.raises(UsageError, match="caches anything"):
        build("nothing", rows("shared", 2, 64))
    with pytest.raises(UsageError, match="no page plan"):
        plan_pages(geometry_of("phi-4"), mode="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="1 or more"):
        plan_pages(geometry_of("phi-4"), 0)
    with pytest.raises(ModelError, match="catalogue"):
        geometry_of("gpt-5")
    with pytest.raises(InfeasibleError, match="bounded"):
        plan_pages(geometry_of("falcon-h1-1.5b"), max_page=1 << 20)
    assert set(MODES) == {"uniform", "max", "static", "lcm", "near"}
