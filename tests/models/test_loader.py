"""Loading: shards, dtypes, broken directories, dummy weights."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmtool.errors import ModelError, UsageError
from llmtool.models.bind import bind
from llmtool.models.checkpoint import slots
from llmtool.models.decoder import NativeDecoder
from llmtool.models.loader import load
from llmtool.models.weights import Matrix, allocate, as_tensor, named_tensors
from llmtool.modelspec import ModelSpec
from tests.models.conftest import FAMILIES
from tests.models.paged import PagedSequences

Tiny = Callable[[str], tuple[transformers.PreTrainedModel, Path]]


@pytest.fixture
def directory(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a saved model that a test may break."""
    return Path(shutil.copytree(tiny("qwen2")[1], tmp_path / "model"))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_sharded_weights_are_the_same(tiny: Tiny, tmp_path: Path) -> None:
    reference, single = tiny("qwen3-biased")
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reports: list[tuple[int, int]] = []
    sharded = load(tmp_path, torch.float32, progress=lambda done, total: reports.append((done, total)))
    ids = [3, 1, 4, 1, 5]
    expected = PagedSequences(load(single, torch.float32)).step({"a": ids})[0]
    assert torch.equal(PagedSequences(sharded).step({"a": ids})[0], expected)
    size = sharded.spec.weight_bytes("float32")
    assert reports[0] == (0, size)
    assert reports[-1] == (size, size)
    assert reports == sorted(reports)


def test_a_missing_shard_is_named(tiny: Tiny, tmp_path: Path) -> None:
    tiny("llama")[0].save_pretrained(tmp_path, max_shard_size="30KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ModelError, match=victim.name):
        load(tmp_path, torch.float32)


def test_every_problem_is_named_at_once(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.lora"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(7)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # old exporters': harmless

    edit(directory, change)
    with pytest.raises(ModelError) as error:
        load(directory, torch.float32)
    assert "missing: model.layers.1.mlp.up_proj.weight;" in error.value.message
    assert "unexpected: model.layers.0.self_attn.q_proj.lora;" in error.value.message
    assert "model.norm.weight is [7], config.json asks for [48]" in error.value.message


def test_a_tied_head_that_was_saved_all_the_same_is_no_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", "off")
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(directory, torch.float32)
    assert isinstance(model, NativeDecoder)
    assert model.weights.lm_head is model.weights.embedding


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "gpt-oss", "deepseek-v3", "llama"])
def test_a_matrix_goes_when_it_is_bound(tiny: Tiny, family: str) -> None:
    """So that at no time more than one is in memory twice: mixtures too, expert by expert."""
    spec = ModelSpec.from_dir(tiny(family)[1])
    weights = allocate(spec, torch.float32, torch.device("cpu"))
    storages = {tensor.untyped_storage().data_ptr() for _, tensor in named_tensors(weights)}
    assert len(storages) == len(
        {id(tensor) for _, tensor in named_tensors(weights)}
    )  # none is a part of another
    bound: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def binder(matrix: Matrix, *_: object, **__: object) -> Matrix:
        nonlocal most
        most = max(most, sum(loaded() is not None for loaded in bound))
        bound.append(weakref.ref(as_tensor(matrix)))
        return torch.empty(0)

    bind(spec, weights, binder)  # type: ignore[arg-type]
    assert len(bound) > 12 and most == 0


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_bytes_of_the_weights(tiny: Tiny, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied embedding counts once, and fewer bits are fewer bytes."""
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", mode)
    _, directory = tiny("smollm")
    plain = load(directory, torch.float32).weight_bytes
    spec_bytes = ModelSpec.from_dir(directory).weight_bytes("float32")
    assert spec_bytes <= plain < 1.2 * spec_bytes  # panels are padded
    eight, four = (load(directory, torch.float32, quantization=q).weight_bytes for q in ("int8", "int4"))
    # Without the kernels four bits lie in a byte each.
    assert eight < 0.4 * plain and (four < 0.8 * eight if mode == "auto" else four < 1.1 * eight)


def test_a_mode_of_the_kernels_that_there_is_not(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", "fast")
    with pytest.raises(UsageError, match="auto, portable, off"):
        load(directory, torch.float32)


def test_heads_that_the_kernels_do_not_take(tiny: Tiny, tmp_path: Path) -> None:
    config = json.loads((tiny("llama")[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 1026, "num_hidden_layers": 1}))
    model = load(tmp_path, torch.float32, load_format="dummy")
    (logits,) = PagedSequences(model, num_pages=4).step({"a": [1, 2, 3]})
    assert logits.isfinite().all()


def test_directories_without_readable_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="not a readable safetensors"):
        load(directory, torch.float32)
    weights.unlink()
    with pytest.raises(ModelError, match="holds no"):
        load(directory, torch.float32)
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(directory, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_need_only_a_config_and_follow_the_seed(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    shutil.copy(tiny(family)[1] / "config.json", tmp_path)
    ids = list(range(10))
    first, second, other = (
        PagedSequences(load(tmp_path, torch.float32, load_format="dummy", seed=seed)).step({"a": ids})[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.isfinite().all()
    assert len(set(first.argmax(-1).tolist())) > 2


def test_slots_are_transformers_names(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", "off")
    for family in ("llama", "llama-biased", "qwen2", "qwen3"):
        reference, directory = tiny(family)
        model = load(directory, torch.float32)
        assert isinstance(model, NativeDecoder)
        table = slots(model.spec, model.weights)
        assert set(table) == {name for name, _ in reference.named_parameters()}
        for name, parameter in reference.named_parameters():
            target = table[name].target
            assert isinstance(target, torch.Tensor) and torch.equal(target, parameter), name


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_cover_all_memory_once(tiny: Tiny, family: str) -> None:
    _, directory = tiny(family)
    weights = allocate(ModelSpec.from_dir(directory), torch.float32, torch.device("cpu"))
    tensors = {tensor.data_ptr(): tensor for _, tensor in named_tensors(weights)}
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    table = slots(ModelSpec.from_dir(directory), weights)
    stored = load_file(directory / "model.safetensors")
    assert set(table) == set(stored) - ({"lm_head.weight"} if weights.lm_head is weights.embedding else set())
    for name, slot in table.items():
        views = [slot.target] if isinstance(slot.target, torch.Tensor) else slot.target
        assert all(view.isnan().all() for view in views), f"{name} fills what another tensor filled"
        slot.fill(stored[name])
    assert not any(tensor.isnan().any() for tensor in tensors.values())


def test_the_index_may_be_nonsense(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(ModelError, match="not a safetensors index"):
        load(directory, torch.float32)
