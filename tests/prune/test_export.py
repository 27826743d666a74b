"""A pruned model loaded by others: in a fresh process without llmtool, in ONNX Runtime, in our own decoder, in
GGUF."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtool.errors import ModelError
from llmtool.models.loader import load
from llmtool.modelspec import ModelSpec
from llmtool.prune.batches import batches
from llmtool.prune.export import huggingface
from llmtool.prune.model import Loaded, load_model
from llmtool.prune.remove import remove, sizes_after
from llmtool.prune.units import Kept, all_units
from tests.models.paged import PagedSequences
from tests.prune.conftest import Tiny, items_of
from tests.prune.test_remove import some_units

FRESH = """
import sys, torch, transformers
from pathlib import Path
sys.modules["llmtool"] = None  # whatever imports it fails
for directory in sorted(Path(sys.argv[1]).iterdir()):
    auto, trust = (directory / "how.txt").read_text().split()
    options = {"trust_remote_code": trust == "True"}
    model = getattr(transformers, auto).from_pretrained(directory, **options).eval()
    with torch.no_grad():
        out = model(**torch.load(directory / "inputs.pt"))
    name = next(n for n in ("logits", "start_logits", "last_hidden_state") if hasattr(out, n))
    difference = (getattr(out, name) - torch.load(directory / "expected.pt")).abs().max().item()
    body = transformers.AutoModel.from_pretrained(directory, **options)
    print(directory.name, difference)
"""
HETEROGENEOUS = (
    "bert",
    "distilbert",
    "roberta",
    "bert-qa",
    "bert-body",
    "vit",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
)
UNIFORM = ("llama", "qwen2", "qwen3", "mistral")


def uniform_units(loaded: Loaded) -> Kept:
    return tuple((0, 1, 2) if s.kind == "attention" else tuple(range(5, 50)) for s in loaded.sublayers)


def write_model(loaded: Loaded, kept: Kept, directory: Path) -> bool:
    small = remove(loaded, loaded.model, kept)
    plain = huggingface.write(loaded, small, sizes_after(loaded.sublayers, kept), directory, torch.float32)
    inputs = dict(batches(items_of(loaded), 16)[0].inputs)
    out = small(**inputs)
    name = next(n for n in ("logits", "start_logits", "last_hidden_state") if hasattr(out, n))
    torch.save(inputs, directory / "inputs.pt")
    torch.save(getattr(out, name), directory / "expected.pt")
    (directory / "how.txt").write_text(f"{loaded.auto} {not plain}")
    return plain


def test_a_fresh_process_without_llmtool_gives_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """Every family with sizes of its own in each layer, and uniform decoders without any custom code."""
    models = tmp_path / "models"
    for name in HETEROGENEOUS:
        loaded = tiny(name)
        assert not write_model(loaded, some_units(loaded), models / name)
    for name in UNIFORM:
        loaded = tiny(name)
        assert write_model(loaded, uniform_units(loaded), models / f"{name}-uniform")
        assert not list((models / f"{name}-uniform").glob("*.py"))
    env = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(models)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found == dict.fromkeys([*HETEROGENEOUS, *(f"{n}-uniform" for n in UNIFORM)], "0.0")
    with pytest.raises(ModelError, match="pruned already"):
        load_model(models / "bert")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("units", [some_units, uniform_units])
def test_our_own_decoder_serves_it(name: str, units: Callable[..., Kept], tiny: Tiny, tmp_path: Path) -> None:
    loaded = tiny(name)
    kept = units(loaded)
    small = remove(loaded, loaded.model, kept)
    sizes = sizes_after(loaded.sublayers, kept)
    huggingface.write(loaded, small, sizes, tmp_path, torch.float32)
    prompt = [5, 9, 33, 60, 12, 7, 80]
    expected = small(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    ours = PagedSequences(load(tmp_path, torch.float32))
    (logits,) = ours.step({"a": prompt})
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    spec = ModelSpec.from_dir(tmp_path)
    cached = sum(c.bytes_per_token for c in spec.layer_cache_specs(2))
    assert cached == sum(kv for _, kv, _ in sizes) * 2 * 8 * 2


def test_generation_is_the_masked_models(tiny: Tiny) -> None:
    from llmtool.prune.masks import binary_masks, masked

    loaded = tiny("llama")
    kept = some_units(loaded)
    small = remove(loaded, loaded.model, kept)
    ids = torch.tensor([[5, 9, 33, 60]])
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "eos_token_id": None,
    }
    with masked(loaded.model, loaded.layout, loaded.sublayers, binary_masks(loaded.sublayers, kept)):
        expected = loaded.model.generate(ids, **options)
    assert small.generate(ids, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "llama"])
def test_onnx_runtime_gives_the_same(name: str, tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from llmtool.prune.export import onnx

    loaded = tiny(name)
    small = remove(loaded, loaded.model, some_units(loaded))
    assert onnx.write(loaded, small, tmp_path / "model.onnx") < 1e-4


def test_gguf_has_the_sizes_and_rows_of_every_layer(tmp_path: Path, smollm2_like: Path) -> None:
    from gguf import GGUFReader

    from llmtool.prune.export import gguf

    loaded = load_model(smollm2_like)
    kept = some_units(loaded)
    small, sizes = remove(loaded, loaded.model, kept), sizes_after(loaded.sublayers, kept)
    gguf.write(loaded, small, sizes, tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [h for h, _, _ in sizes]
    assert fields["deci.attention.head_count_kv"] == [k for _, k, _ in sizes]
    assert fields["deci.feed_forward_length"] == [w for _, _, w in sizes]
    tensors = {t.name: t for t in reader.tensors}
    assert "blk.1.attn_q.weight" not in tensors and "blk.1.ffn_norm.weight" not in tensors
    query = torch.from_numpy(tensors["blk.0.attn_q.weight"].data.copy()).float()
    stored = small.model.layers[0].self_attn.q_proj.weight
    halves = query.unflatten(0, (3, 4, 2)).transpose(1, 2).flatten(0, 2)
    torch.testing.assert_close(halves, stored.half().float())


def test_gguf_refuses_what_llama_cpp_cannot_hold(tiny: Tiny, tmp_path: Path) -> None:
    from llmtool.prune.export import gguf

    loaded = tiny("qwen3")
    sizes = sizes_after(loaded.sublayers, all_units(loaded.sublayers))
    with pytest.raises(ModelError, match="no architecture for a pruned qwen3"):
        gguf.write(loaded, loaded.model, sizes, tmp_path / "m.gguf")


@pytest.fixture
def smollm2_like(directory_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny llama with a byte-level BPE tokenizer, as SmolLM2 has one."""
    import shutil

    import transformers
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    target = tmp_path / "bpe"
    shutil.copytree(directory_of("llama"), target)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:93]
    vocab = {"<|endoftext|>": 0, "<bos>": 1, "<eos>": 2} | {c: i + 3 for i, c in enumerate(letters)}
    vocab["!!"] = 96
    backend = Tokenizer(BPE(vocab, [("!", "!")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>"
    )
    for path in target.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(target)
    return target


def test_report_of_a_config_is_json(tiny: Tiny, tmp_path: Path) -> None:
    loaded = tiny("bert")
    kept = some_units(loaded)
    huggingface.write(
        loaded,
        remove(loaded, loaded.model, kept),
        sizes_after(loaded.sublayers, kept),
        tmp_path,
        torch.float16,
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["per_layer_config"]["1"] == {"num_attention_heads": 0, "intermediate_size": 0}
    assert config["dtype"] == "float16" and config["num_attention_heads"] == 6
