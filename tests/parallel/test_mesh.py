"""Who stands where, who holds what, and which pages are whose: plain integers, up to 64 ranks of large models."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from llmtool.core.memory.arena import Arena
from llmtool.core.memory.geometry import UNIT, KVCacheGroup, uniform_group
from llmtool.core.memory.model import ModelGeometry
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.select import plan_of
from llmtool.errors import InfeasibleError, ModelError, UsageError
from llmtool.modelspec import DenseSpec, ModelSpec, MoESpec
from llmtool.modelspec.catalogue import names, read_config
from llmtool.parallel.mesh import Mesh, split
from llmtool.parallel.pages import local_pages
from llmtool.parallel.shard import Shard, shard_of, split_heads, split_neurons

MOST = 64


def catalogue() -> dict[str, ModelSpec]:
    """The catalogue's models that run here."""
    found = {}
    for name in names():
        try:
            found[name] = ModelSpec.from_config(read_config(name))
        except ModelError:
            continue
    return found


MODELS = catalogue()
BIG = [name for name, spec in MODELS.items() if spec.num_parameters > 6e9]


def meshes(spec: ModelSpec) -> list[Mesh]:
    """Every mesh of up to 64 ranks that the model divides over."""
    moe = any(isinstance(layer.mlp, MoESpec) for layer in spec.layers)
    found = []
    for tp in (1, 2, 3, 4, 6, 8, 16, 32, 64):
        for pp in range(1, MOST // tp + 1):
            if pp <= spec.num_layers and (pp & (pp - 1) == 0 or pp in (3, 5, 7, 12)):
                found += [Mesh(tp, pp, ep) for ep in sorted({1, tp if moe else 1})]
    return found


def test_the_catalogue_has_large_models_of_several_families() -> None:
    assert len(BIG) >= 12 and len({MODELS[name].family for name in BIG}) >= 7


@pytest.mark.parametrize("name", BIG)
def test_every_plan_of_up_to_64_ranks_covers_the_model(name: str) -> None:
    """Heads, neurons, experts and vocabulary of each layer are on exactly one rank each, but for KV heads that are
    fewer than the ranks, of which everyone has what its query heads read."""
    spec, runs = MODELS[name], 0
    for mesh in meshes(spec):
        try:
            shards = [shard_of(spec, mesh, rank) for rank in range(mesh.world)]
        except UsageError as error:
            assert mesh.tp > spec.num_heads or "experts" in error.message or "state" in error.message
            continue
        runs += 1
        layers = [i for shard in shards if shard.leads for i in shard.layers]
        assert layers == list(range(spec.num_layers))
        for stage in range(mesh.pp):
            check_stage(spec, mesh, [shards[r] for r in mesh.stage_ranks(stage)])
    assert runs > 12


def check_stage(spec: ModelSpec, mesh: Mesh, shards: list[Shard]) -> None:
    first, last = shards[0].first, shards[0].last
    assert {(s.first, s.last) for s in shards} == {(first, last)}
    for rows, wanted in (([s.embedding for s in shards], first), ([s.head for s in shards], last)):
        assert joined(rows, spec.vocab_size if wanted else 0)
    for i, number in enumerate(shards[0].layers):
        layer, parts = spec.layers[number], [s.parts[i] for s in shards]
        a = spec.attention_of(layer)
        assert joined([p.heads for p in parts], a.num_heads)
        group = a.num_heads // a.num_kv_heads
        for shard, part in zip(shards, parts, strict=True):
            own = shard.spec.attention_of(shard.spec.layers[i])
            assert (own.num_heads, own.num_kv_heads) == (len(part.heads), len(part.kv_heads))
            if (
                a.latent is None and part.heads
            ):  # grouped: each of its KV heads is read by as many query heads
                assert {h // group for h in part.heads} == set(part.kv_heads)
                assert len(part.heads) % len(part.kv_heads) == 0
        if a.latent is None:
            owned = Counter(h for p in parts if p.owns_kv for h in p.kv_heads)
            assert owned == Counter(range(a.num_kv_heads))
            most = max(Counter(h for p in parts for h in p.kv_heads).values())
            assert most == max(1, -(-mesh.tp // a.num_kv_heads))
        if isinstance(layer.mlp, DenseSpec):
            assert joined([p.neurons for p in parts], layer.mlp.intermediate_size)
        else:
            check_experts(layer.mlp, mesh, shards, i)


def check_experts(moe: MoESpec, mesh: Mesh, shards: list[Shard], i: int) -> None:
    """Each neuron of each expert on one rank."""
    parts = [s.parts[i] for s in shards]
    groups: dict[range, list[range]] = {}
    for part in parts:
        groups.setdefault(part.experts, []).append(part.neurons)
    assert joined(list(groups), moe.router.num_experts) and len(groups) == mesh.ep
    assert all(joined(neurons, moe.intermediate_size) for neurons in groups.values())
    assert joined([p.shared for p in parts], moe.shared_size)


def joined(parts: list[range], count: int) -> bool:
    """Whether the parts, in order, are the whole."""
    at = 0
    for part in parts:
        if part and part.start != at:
            return False
        at = part.stop if part else at
    return at == count


def test_places_are_tensor_ranks_side_by_side() -> None:
    mesh = Mesh(tp=4, pp=3, ep=2, nodes=2)
    places = [mesh.place(rank) for rank in range(mesh.world)]
    assert [p.stage for p in places] == [0] * 4 + [1] * 4 + [2] * 4
    assert [p.tensor for p in places[:5]] == [0, 1, 2, 3, 0]
    assert [(p.expert_group, p.expert_part) for p in places[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(p.node, p.local) for p in places[4:8]] == [(0, 4), (0, 5), (1, 0), (1, 1)]
    assert all(mesh.rank_of(p.stage, p.tensor) == p.rank for p in places)
    assert [r for node in range(2) for r in mesh.node_ranks(node)] == list(range(12))
    assert Mesh(pp=3).stage_layers(8) == (range(3), range(3, 6), range(6, 8))
    assert Mesh(pp=2, layers=(1, 7)).stage_layers(8) == (range(1), range(1, 8))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tp": 0}, "tp size is 0"),
        ({"tp": 3, "ep": 2}, "do not divide a stage of 3"),
        ({"tp": 3, "nodes": 2}, "3 ranks .* do not divide over 2 nodes"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Mesh(**sizes)


def test_a_model_that_does_not_divide_is_refused() -> None:
    llama = MODELS["llama-3.1-8b"]
    for mesh, says in (
        (Mesh(pp=33), "32 layers are too few for 33 stages"),
        (Mesh(pp=2, layers=(10, 10)), "10\\+10, and the model has 32"),
        (Mesh(tp=2, ep=2), "has no experts"),
        (Mesh(tp=64), "32 heads, too few"),
    ):
        with pytest.raises(UsageError, match=says):
            shard_of(llama, mesh, 0)


def test_heads_go_with_what_they_read() -> None:
    for kv_heads in range(1, 9):
        for group in range(1, 7):
            heads = kv_heads * group
            for parts in range(1, heads + 1):
                shares = [split_heads(heads, kv_heads, parts, i) for i in range(parts)]
                assert [h for q, _, _ in shares for h in q] == list(range(heads))
                assert all(q and {h // group for h in q} == set(kv) for q, kv, _ in shares)
                assert sum(len(kv) for _, kv, owns in shares if owns) == kv_heads
    assert split_heads(0, 0, 3, 1) == (range(0), range(0), True)
    # Of a pruned layer with two query heads over one KV head, the third rank has none.
    assert [len(split_heads(2, 1, 3, i)[0]) for i in range(3)] == [1, 1, 0]


def test_neurons_stay_in_units_where_these_divide() -> None:
    assert [len(split_neurons(1536, 2, i)) for i in range(2)] == [768, 768]
    assert [len(split_neurons(14336, 3, i)) for i in range(3)] == [4800, 4800, 4736]
    assert [len(split_neurons(7, 2, i)) for i in range(2)] == [4, 3]
    for count in range(200):
        for parts in range(1, 9):
            shares = [split_neurons(count, parts, i) for i in range(parts)]
            assert joined(shares, count)
    assert [len(r) for r in split(10, 4)] == [3, 3, 2, 2]


# -- pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "gemma-3-27b", "gpt-oss-20b", "falcon-h1-1.5b", "lfm2-1.2b"]
)
@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 3), (8, 2)])
def test_pages_of_a_plan_keep_apart_on_every_rank(name: str, shape: tuple[int, int]) -> None:
    """What two pages hold lies in different bytes on each rank, inside its arena, and as many of them as the plan
    has large pages fit."""
    spec, mesh = MODELS[name], Mesh(*shape)
    whole = shard_of(spec, Mesh(tp=mesh.tp), 0).spec
    caches = whole.layer_cache_specs(2)
    plan: PagePlan | KVCacheGroup = plan_of(ModelGeometry(name, tuple(caches)), 16, "near") or uniform_group(
        caches, 16
    )
    count, seen = 5, set[int]()
    for rank in range(mesh.world):
        shard = shard_of(spec, mesh, rank)
        pages = local_pages(plan, shard.spec.layer_cache_specs(2), shard.layers)
        assert pages.page_bytes % UNIT == 0
        seen |= {layer.layer + shard.layers.start for g in pages.groups for layer in g.layers}
        for i, group in enumerate(pages.groups):
            entries = _entries(plan, pages.kept[i], count)
            own = pages.entries(i, entries)
            spans = sorted((e * UNIT, e * UNIT + group.payload_bytes) for e in own.tolist())
            assert spans[0][0] >= 0 and spans[-1][1] <= count * pages.page_bytes
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
            whole_group = plan.groups[pages.kept[i]] if isinstance(plan, PagePlan) else plan
            assert group.tokens_per_page == whole_group.tokens_per_page
        # Pages of different groups in one large page keep inside it: each large page has one kind of small ones.
        for i in range(len(pages.groups)):
            entries = _entries(plan, pages.kept[i], count)
            large = np.asarray(entries) // (_large(plan) // UNIT)
            assert (pages.entries(i, entries) // (pages.page_bytes // UNIT) == large).all()
    assert seen == {layer.layer for layer in caches}


def _large(plan: PagePlan | KVCacheGroup) -> int:
    return plan.large_page if isinstance(plan, PagePlan) else plan.page_bytes


def _entries(plan: PagePlan | KVCacheGroup, group: int, count: int) -> list[int]:
    """All table entries that a group's pages may have in `count` large pages, as the arena names them."""
    if isinstance(plan, KVCacheGroup):
        return [i * plan.page_units for i in range(count)]
    kind = [n for n, pool in enumerate(plan.pools) for _ in pool.groups][group]
    arena = Arena.of(plan, count)
    wants = [count * pool.per_large if n == kind else 0 for n, pool in enumerate(plan.pools)]
    return sorted(arena.entry(page) for page in arena.take(wants, "x").pages[kind])


def test_a_stage_that_caches_nothing_is_refused() -> None:
    spec = MODELS["lfm2-1.2b"]
    caches = spec.layer_cache_specs(2)
    with pytest.raises(InfeasibleError, match="cache nothing"):
        local_pages(uniform_group(caches[:1], 16), [], range(2, 4))
