"""Every family cut into parts says what it says whole: shapes, and logits of a prompt in chunks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmtool.core.memory.geometry import uniform_group
from llmtool.errors import UsageError
from llmtool.models.checkpoint import cut_shape
from llmtool.models.decoder import KVContext, StageDecoder
from llmtool.models.loader import load, load_part
from llmtool.models.part import Part
from llmtool.models.shard_slots import shard_slots, whole_shapes
from llmtool.models.weights import allocate_shard
from llmtool.modelspec import ModelSpec, MoESpec
from llmtool.parallel.mesh import Mesh
from llmtool.parallel.shard import shard_of
from tests.models.conftest import FAMILIES, build
from tests.models.conftest import tiny as tiny  # the fixture
from tests.models.paged import PagedSequences
from tests.parallel.threads import ThreadPeers, together

Tiny = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
PROMPT = torch.randint(0, 97, (23,), generator=torch.Generator().manual_seed(5)).tolist()
CHUNKS = (PROMPT[:14], PROMPT[14:22], PROMPT[22:])
MOE = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v2-groups", "deepseek-v3"]
# Heads that do not divide, ranks that hold the same KV head, vocabulary that does not divide, stages of 2 + 1
# layers.
MESHES = {
    "tp2": Mesh(tp=2),
    "tp3": Mesh(tp=3),
    "tp5": Mesh(tp=5),
    "pp2": Mesh(pp=2),
    "pp3 x tp2": Mesh(tp=2, pp=3),
    "uneven pp2": Mesh(pp=2, layers=(1, 2)),
}
EXPERT_MESHES = {"ep2": Mesh(tp=2, ep=2), "ep3": Mesh(tp=3, ep=3), "ep2 of tp4": Mesh(tp=4, ep=2)}


class Stages:
    """All stages of a rank's column, one after the other in one thread, each over pages of its own."""

    def __init__(self, parts: list[StageDecoder]) -> None:
        self.parts = parts
        self.spec, self.device = parts[0].spec, parts[0].device
        self.sequences = [PagedSequences(part) for part in parts]  # type: ignore[arg-type]

    def logits(self, chunk: list[int]) -> torch.Tensor:
        hidden: torch.Tensor | None = None
        for stage, sequences in zip(self.parts, self.sequences, strict=True):
            hidden = _forward(stage, sequences, chunk, hidden)
        return self.parts[-1].logits(hidden)


def _forward(
    stage: StageDecoder, pages: PagedSequences, chunk: list[int], hidden: torch.Tensor | None
) -> torch.Tensor:
    """PagedSequences.step's forward, with hidden states for ids and without logits."""
    seen: list[torch.Tensor] = []

    class Model:
        spec, device = stage.spec, stage.device

        def forward(self, ids: torch.Tensor, at: torch.Tensor, kv: KVContext) -> torch.Tensor:
            seen.append(stage.forward(ids, at, kv, None, hidden).clone())
            return seen[0]

        def logits(self, given: torch.Tensor) -> torch.Tensor:
            return given

    pages.model = Model()  # type: ignore[assignment]
    pages.step({"a": chunk})
    return seen[0]


def logits_of(directory: Path, mesh: Mesh, quantization: str | None = None) -> list[torch.Tensor]:
    """[23, vocab], as each rank of the last stage together has them."""
    whole = ModelSpec.from_dir(directory)

    def work(peers: ThreadPeers) -> torch.Tensor:
        torch.set_num_threads(1)
        parts = [
            load_part(
                directory,
                Part(shard_of(whole, mesh, mesh.rank_of(stage, peers.rank)), peers),
                torch.float32,
                max_length=len(PROMPT),
                quantization=quantization,
            )
            for stage in range(mesh.pp)
        ]
        stages = Stages(parts)
        mine = torch.cat([stages.logits(chunk) for chunk in CHUNKS])
        counts = [len(shard_of(whole, mesh, mesh.rank_of(mesh.pp - 1, t)).head) for t in range(mesh.tp)]
        return peers.gather(mine.T.contiguous(), counts).T

    return together(mesh.tp, work)


# Every family on the kernels and without them; those unlike the others in all ways.
CASES = [
    *((family, mesh, "auto") for family in sorted(FAMILIES) for mesh in ("tp2", "pp3 x tp2")),
    *((family, "tp3", "off") for family in sorted(FAMILIES)),
    *(
        (family, mesh, "auto")
        for family in ("smollm", "olmo2", "gemma3", "gpt-oss", "deepseek-v3")
        for mesh in ("tp5", "pp2", "uneven pp2")
    ),
]


@pytest.mark.parametrize(("family", "mesh", "kernels"), CASES)
def test_parts_say_what_the_whole_says(
    tiny: Tiny, family: str, mesh: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", kernels)
    reference, directory = tiny(family)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    whole = ModelSpec.from_dir(directory)
    if whole.num_heads < MESHES[mesh].tp:
        with pytest.raises(UsageError, match="too few for a tensor parallel size"):
            shard_of(whole, MESHES[mesh], 0)
        return
    for logits in logits_of(directory, MESHES[mesh]):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


# Columns that two ranks divide at the end of a group, of eight bits (192) and of four (64).
GROUPED = {
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 384,
}


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe"])
def test_fewer_bits_are_the_same_bits(
    family: str, quantization: str, kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A part is rounded as it is in the whole."""
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", kernels)
    experts = {"moe_intermediate_size": 384} if "moe" in family else {}
    build(family, **GROUPED, **experts).save_pretrained(tmp_path)
    whole = load(tmp_path, torch.float32, max_length=len(PROMPT), quantization=quantization)
    sequences = PagedSequences(whole)
    expected = torch.cat([sequences.step({"a": chunk})[0] for chunk in CHUNKS])
    for mesh in ("tp2", "pp2"):
        for logits in logits_of(tmp_path, MESHES[mesh], quantization):
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


# layer -> (KV heads, query heads of each, neurons): uneven, fewer than the ranks, none.
KEPT = {0: (1, 1, 33), 1: (0, 0, 80), 2: (2, 2, 0)}


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("mesh", ["tp2", "tp3", "pp2"])
def test_a_pruned_model_with_heads_per_layer(
    mesh: str, kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", kernels)
    build("llama").save_pretrained(tmp_path)
    weights, entries = load_file(tmp_path / "model.safetensors"), {}
    for layer, (kv_heads, group, neurons) in KEPT.items():
        q, kv = kv_heads * group * 8, kv_heads * 8
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            weights[key] = weights[key][:rows].contiguous()
        key = f"model.layers.{layer}.self_attn.o_proj.weight"
        weights[key] = weights[key][:, :q].contiguous()
        for name in ("gate", "up"):
            key = f"model.layers.{layer}.mlp.{name}_proj.weight"
            weights[key] = weights[key][:neurons].contiguous()
        key = f"model.layers.{layer}.mlp.down_proj.weight"
        weights[key] = weights[key][:, :neurons].contiguous()
        entries[str(layer)] = {
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "intermediate_size": neurons,
        }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "per_layer_config": entries}))
    sequences = PagedSequences(load(tmp_path, torch.float32))
    expected = torch.cat([sequences.step({"a": chunk})[0] for chunk in CHUNKS])
    for logits in logits_of(tmp_path, MESHES[mesh]):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("mesh", EXPERT_MESHES)
@pytest.mark.parametrize("family", MOE)
def test_experts_on_ranks_of_their_own_say_the_same(
    tiny: Tiny, family: str, mesh: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", kernels)
    reference, directory = tiny(family)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    for logits in logits_of(directory, EXPERT_MESHES[mesh]):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shards_have_the_shapes_of_their_cuts_and_cover_the_model(tiny: Tiny, family: str) -> None:
    """Every byte of every tensor is on some rank; what is cut is on as many as hold its KV head, and no more."""
    whole = ModelSpec.from_dir(tiny(family)[1])
    shapes = whole_shapes(whole)
    for mesh in [*MESHES.values(), *(EXPERT_MESHES.values() if any(_experts(whole)) else [])]:
        if whole.num_heads < mesh.tp:
            continue
        covered: dict[str, set[tuple[int, ...]]] = {name: set() for name in shapes}
        for rank in range(mesh.world):
            shard = shard_of(whole, mesh, rank)
            weights = allocate_shard(shard, torch.float32, torch.device("meta"))
            for name, slot in shard_slots(shard, weights).items():
                assert cut_shape(shapes[name], slot.cut) == slot.file_shape, (name, rank)
                index = torch.zeros(shapes[name], dtype=torch.bool)
                at = tuple(
                    torch.tensor([i for r in dict(slot.cut).get(dim, (range(size),)) for i in r])
                    for dim, size in enumerate(shapes[name])
                )
                index[torch.meshgrid(*at, indexing="ij")] = True
                covered[name].update(map(tuple, index.nonzero().tolist()))
        for name, shape in shapes.items():
            assert len(covered[name]) == torch.Size(shape).numel(), (name, mesh)


def _experts(spec: ModelSpec) -> list[bool]:
    return [isinstance(layer.mlp, MoESpec) for layer in spec.layers]


def test_a_rank_reads_its_part_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtool.models import loader

    read: list[tuple[str, int]] = []
    tensors = loader._tensors

    def counting(*arguments: object) -> object:
        for name, tensor in tensors(*arguments):  # type: ignore[arg-type]
            read.append((name, tensor.numel()))
            yield name, tensor

    monkeypatch.setattr(loader, "_tensors", counting)
    directory = tiny("llama")[1]
    whole = ModelSpec.from_dir(directory)
    mesh = Mesh(tp=2, pp=3)
    for rank in range(mesh.world):
        read.clear()

        class Alone:
            pass

        shard = shard_of(whole, mesh, rank)
        load_part(directory, Part(shard, Alone()), torch.float32)  # type: ignore[arg-type]
        held = allocate_shard(shard, torch.float32, torch.device("meta"))
        slots = shard_slots(shard, held)
        assert {name for name, _ in read} == set(slots)
        assert sum(n for _, n in read) == sum(torch.Size(slot.file_shape).numel() for slot in slots.values())
        assert sum(n for _, n in read) < whole.num_parameters / 3


def test_kv_of_a_group_of_heads(tiny: Tiny) -> None:
    """What a rank caches is what it holds of the heads."""
    whole = ModelSpec.from_dir(tiny("llama")[1])
    token_bytes = [
        uniform_group(shard_of(whole, Mesh(tp=tp), 0).spec.layer_cache_specs(4), 4).bytes_per_token
        for tp in (1, 2)
    ]
    assert token_bytes[0] == 2 * token_bytes[1]
    assert load(tiny("llama")[1], torch.float32).spec == whole
