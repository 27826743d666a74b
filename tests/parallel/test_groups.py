"""Process groups of large meshes, without processes: torch's fake backend, and weights without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmtool.errors import UsageError
from llmtool.models.checkpoint import cut_shape
from llmtool.models.shard_slots import shard_slots, whole_shapes
from llmtool.models.weights import allocate_shard, named_tensors
from llmtool.parallel.mesh import Mesh
from llmtool.parallel.shard import shard_of
from llmtool.runtime.parallel import links as module
from llmtool.runtime.parallel.links import Links
from tests.parallel.test_mesh import BIG, MODELS, meshes

META = torch.device("meta")


@contextmanager
def fake(mesh: Mesh, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mesh", [Mesh(8, 8), Mesh(4, 3, 4), Mesh(1, 5), Mesh(64)], ids=str)
def test_groups_of_a_mesh(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is in the group of its stage, and its neighbours are those of its column."""
    made: list[list[int]] = []
    real = dist.new_group

    def new_group(ranks: list[int], **options: object) -> object:
        made.append(ranks)
        return real(ranks, backend="fake")

    monkeypatch.setattr(module.dist, "new_group", new_group)
    for rank in (0, mesh.world // 2, mesh.world - 1):
        made.clear()
        with fake(mesh, rank):
            place = mesh.place(rank)
            links = Links(mesh, place, torch.device("cpu"), 5.0)
            assert made[3:] == [list(mesh.stage_ranks(s)) for s in range(mesh.pp)]
            assert rank in made[3 + place.stage] and all(len(group) == mesh.world for group in made[:3])
            x = torch.ones(4, 6)
            assert links.peers.sum(x).shape == x.shape
            counts = [3 + (i < 2) for i in range(mesh.tp)]
            got = links.peers.gather(torch.ones(counts[place.tensor], 6), counts)
            assert got.shape == (sum(counts), 6)


@pytest.mark.parametrize("name", BIG)
def test_shards_of_large_models_have_the_shapes_of_their_cuts(name: str) -> None:
    """Of the largest and the oddest meshes, every kind of rank: first, middle and last stage, first and last
    part."""
    spec = MODELS[name]
    shapes = whole_shapes(spec)
    chosen = [m for m in meshes(spec) if m.world in (64, 48, 6) and m.pp > 1][-3:]
    for mesh in chosen:
        ranks = {0, mesh.tp - 1, mesh.world // 2, mesh.world - mesh.tp, mesh.world - 1}
        for rank in sorted(ranks):
            try:
                shard = shard_of(spec, mesh, rank)
            except UsageError:
                continue
            weights = allocate_shard(shard, torch.bfloat16, META)
            slots = shard_slots(shard, weights)
            for tensor_name, slot in slots.items():
                assert cut_shape(shapes[tensor_name], slot.cut) == slot.file_shape, (tensor_name, mesh, rank)
            held = sum({id(t): t.numel() for _, t in named_tensors(weights)}.values())
            held -= (
                0 if shard.last else spec.hidden_size
            )  # the norm after the last layer, which nothing fills
            assert held == sum(torch.Size(slot.file_shape).numel() for slot in slots.values())
