"""Models without a native family: through transformers over our pages, or refused with the reason."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtool.errors import ModelError
from llmtool.models.loader import load
from llmtool.models.transformers_backend import TransformersDecoder
from tests.models.foreign import RUNS, save
from tests.models.paged import PagedSequences

PROMPT = torch.randint(0, 97, (29,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("kind", RUNS)
def test_logits_of_models_without_a_family(tmp_path: Path, kind: str) -> None:
    reference = save(tmp_path, kind, RUNS[kind])
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.1
    model = load(tmp_path, torch.float32)
    assert isinstance(model, TransformersDecoder)
    assert (model.spec.eos_ids, model.spec.vocab_size, model.spec.max_positions) == ((0,), 97, 128)
    assert model.spec.num_parameters == sum(p.numel() for p in reference.parameters())
    windows = {7} if kind == "starcoder2" else {7, None} if "sliding_window" in RUNS[kind] else {None}
    assert set(model.spec.windows) == windows
    sequences = PagedSequences(model)
    cuts = [0, 9, 10, 11, 20, 29]
    got = [
        sequences.step({"stranger": [3, 4], "a": PROMPT[start:end]})[1]
        for start, end in itertools.pairwise(cuts)
    ]
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bloom", {"n_layer": 3}, "does not take transformers' attention interface"),
        ("mamba", {}, "has layers of linear_attention"),
        ("nemotron", {}, "does not hand on to attention what its model is given"),
        ("diffllama", {}, r"attention is called by layers \[0, 0, 1, 1, 2, 2\], and each of its 3 layers"),
        (
            "llama4_text",
            {"head_dim": 8, "layer_types": ["chunked_attention"] * 3},
            "has layers of chunked_attention",
        ),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"]}, "has layers of conv"),
    ],
)
def test_what_cannot_run_says_why(tmp_path: Path, kind: str, settings: dict[str, Any], message: str) -> None:
    save(tmp_path, kind, settings)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, torch.float32)


def test_a_model_that_looks_at_more_than_keys_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that adds a bias by distance, as some do: the comparison before serving shows it."""
    from transformers.models.gpt2 import modeling_gpt2

    save(tmp_path, "gpt2", {})
    plain = modeling_gpt2.eager_attention_forward

    def biased(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **rest: Any) -> Any:
        distance = torch.arange(k.shape[2]) - torch.arange(k.shape[2])[:, None]
        return plain(module, q, k, v, mask + 0.3 * distance.clamp(max=0), **rest)

    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", biased)
    with pytest.raises(ModelError, match="must look at more than its queries, keys and values"):
        load(tmp_path, torch.float32)


def test_directories_that_transformers_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NovelForCausalLM"], "model_type": "novel"}')
    with pytest.raises(ModelError, match=r"neither natively nor through transformers: .*novel"):
        load(tmp_path, torch.float32)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "gpt2", {})
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: transformer\.h\.1\.mlp\.c_fc\.weight"):
        load(tmp_path, torch.float32)


def test_dummy_weights(tmp_path: Path) -> None:
    save(tmp_path, "gpt2", {})
    (tmp_path / "model.safetensors").unlink()
    first, second = (
        PagedSequences(load(tmp_path, torch.float32, load_format="dummy", seed=seed)).step({"a": [1, 2, 3]})[
            0
        ]
        for seed in (1, 2)
    )
    assert first.isfinite().all() and not torch.equal(first, second)
