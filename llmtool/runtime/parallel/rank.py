"""What every rank does before the first step: it joins the process groups, loads its part, and agrees with the
others on how many pages there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llmtool.config import EngineConfig
from llmtool.core.memory.geometry import KVCacheGroup, uniform_group
from llmtool.core.memory.model import ModelGeometry
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.select import plan_of
from llmtool.core.memory.tables import Pages, PlanPages
from llmtool.errors import ModelError
from llmtool.models.decoder import StageDecoder
from llmtool.models.kv_scales import checked
from llmtool.models.loader import load_part
from llmtool.models.part import Part
from llmtool.modelspec import ModelSpec
from llmtool.parallel.mesh import Mesh
from llmtool.parallel.pages import LocalPages, LocalSizes, local_pages
from llmtool.parallel.shard import Shard, shard_of
from llmtool.runtime.budget import KVBudget, activation_bytes, kv_budget
from llmtool.runtime.device import (
    DeviceMemory,
    device_memory,
    host_memory,
    pick_device,
    pick_dtype,
    pick_kv_dtype,
    set_threads,
)
from llmtool.runtime.kv_store import KVStore
from llmtool.runtime.parallel.links import Links
from llmtool.runtime.parallel.rendezvous import Health, interface, wait_for


@dataclass(slots=True)
class Rank:
    """A rank that is ready but for its pages. plan: of the model's pages, as the scheduler has it; pages: of it
    here. sizes: how many pages sequences need, and how large they are here."""

    shard: Shard
    model: StageDecoder
    links: Links
    plan: KVCacheGroup | PagePlan
    pages: LocalPages
    sizes: LocalSizes
    kv_dtype: torch.dtype | None
    activations: int
    num_threads: int

    def store(self, budget: KVBudget) -> KVStore:
        """Its pages."""
        return KVStore(
            self.pages.groups,
            budget.num_pages,
            budget.host_pages,
            self.model.device,
            self.kv_dtype,
            None if self.kv_dtype is None else checked(self.model.kv_scales),
            self.pages.page_bytes,
        )


def mesh_of(config: EngineConfig) -> Mesh:
    tp = config.tensor_parallel_size
    return Mesh(
        tp,
        config.pipeline_parallel_size,
        tp if config.enable_expert_parallel else 1,
        config.nnodes,
        config.pipeline_layers,
    )


def whole_spec(directory: Path) -> ModelSpec:
    """Raises ModelError for a model that cannot be cut."""
    if not ModelSpec.is_native(directory):
        raise ModelError(
            f"The model in {directory} runs through transformers, in one process.",
            "Leave out --tensor-parallel-size and --pipeline-parallel-size, or take a model of a native family.",
        )
    return ModelSpec.from_dir(directory)


def page_plan(
    config: EngineConfig, whole: ModelSpec, mesh: Mesh, kv_bytes: int, dtype_bytes: int
) -> tuple[KVCacheGroup | PagePlan, Pages]:
    """The plan for all layers, with the heads that the first rank of a stage has: the same on every rank."""
    spec = shard_of(whole, Mesh(tp=mesh.tp, ep=mesh.ep), 0).spec
    caches = spec.layer_cache_specs(kv_bytes, dtype_bytes)
    plan = plan_of(ModelGeometry(spec.family, tuple(caches)), config.block_size, config.kv_page_plan)
    if plan is None:
        group = uniform_group(caches, config.block_size)
        return group, group
    return plan, PlanPages(plan, config.scheduler(1).max_num_batched_tokens)


def device_of(config: EngineConfig, local: int) -> torch.device:
    """A GPU for each rank of a machine; or the CPU for all."""
    device = pick_device(config.device)
    return pick_device(f"cuda:{local}") if device.type == "cuda" else device


def prepare(
    config: EngineConfig,
    directory: Path,
    rank: int,
    store: dist.TCPStore,
    loading: Callable[[int, int], None] | None = None,
) -> Rank:
    """Join, and load. Raises what `load` raises, and UsageError for a model that does not divide."""
    mesh, whole = mesh_of(config), whole_spec(directory)
    place, shard = mesh.place(rank), shard_of(whole, mesh, rank)
    device = device_of(config, place.local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype, kv_dtype = pick_dtype(config.dtype, device), pick_kv_dtype(config.kv_cache_dtype, device)
    threads = config.num_threads
    if threads is None and device.type == "cpu":
        threads = max(1, set_threads(None) // mesh.per_node)
    num_threads = set_threads(threads)
    limit = timedelta(seconds=config.distributed_timeout_seconds)
    with interface(config):
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=mesh.world,
            timeout=limit,
        )
        links = Links(mesh, place, device, config.distributed_timeout_seconds, store)
    part = Part(shard, links.peers)
    model = load_part(
        directory,
        part,
        dtype,
        device,
        loading,
        config.load_format,
        config.seed,
        config.max_model_len,
        config.quantization,
    )
    kv_bytes = (kv_dtype or dtype).itemsize
    plan, sizes = page_plan(config, whole, mesh, kv_bytes, dtype.itemsize)
    pages = local_pages(plan, shard.spec.layer_cache_specs(kv_bytes, dtype.itemsize), shard.layers)
    limits = config.scheduler(1)
    activations = activation_bytes(
        shard.spec, dtype.itemsize, limits.max_num_batched_tokens, limits.max_num_seqs
    )
    return Rank(
        shard,
        model,
        links,
        plan,
        pages,
        LocalSizes(sizes, pages.page_bytes),
        kv_dtype,
        activations,
        num_threads,
    )


def agree(config: EngineConfig, rank: Rank, store: dist.TCPStore, health: Health | None = None) -> KVBudget:
    """The pages that every rank has room for, once all are loaded. Raises as `kv_budget`; `health` raises where a
    rank is gone meanwhile."""
    mesh, mine = rank.shard.mesh, rank.shard.place.rank
    ranks = range(mesh.world)
    decoder = f"{type(rank.model).__name__} {rank.model.dtype} {rank.model.device.type}"
    store.set(f"loaded/{mine}", decoder)
    wait_for(store, [f"loaded/{r}" for r in ranks], None, health)
    theirs = {r: store.get(f"loaded/{r}").decode() for r in ranks}
    if set(theirs.values()) != {decoder}:
        raise ModelError(
            f"The ranks run different things: {', '.join(f'{r}: {what}' for r, what in theirs.items())}.",
            "Use machines alike, or set --dtype and LLMTOOL_CPU_KERNELS.",
        )
    memory, on_cpu = device_memory(rank.model.device), rank.model.device.type == "cpu"
    host_free = host_memory().free // mesh.per_node
    if on_cpu:  # which the ranks of a machine share
        memory = DeviceMemory(memory.total, memory.free // mesh.per_node)
    budget = kv_budget(
        config,
        rank.sizes,
        rank.shard.whole.max_positions,
        memory,
        rank.activations,
        on_cpu,
        host_free,
    )
    store.set(f"budget/{mine}", json.dumps([budget.num_pages, budget.host_pages, budget.max_model_len]))
    wait_for(store, [f"budget/{r}" for r in ranks], None, health)
    all_of_them = [json.loads(store.get(f"budget/{r}")) for r in ranks]
    pages, host, length = (min(column) for column in zip(*all_of_them, strict=True))
    return KVBudget(pages, host, length)
