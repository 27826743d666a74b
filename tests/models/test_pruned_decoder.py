"""A decoder whose layers differ in heads and widths, against transformers' model with the same rows cut out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmtool.models.loader import load
from tests.models.conftest import build
from tests.models.paged import PagedSequences

Tiny = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
PROMPT = torch.randint(0, 97, (19,), generator=torch.Generator().manual_seed(6)).tolist()
# layer -> (kept KV heads, query heads kept in each of their groups of 3, kept neurons)
KEPT = {0: ([1], 3, 33), 1: ([], 0, 80), 2: ([0, 1], 2, 0)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_masked_transformers_and_pruned_native_agree(family: str, tmp_path: Path) -> None:
    model = build(family)
    dim = model.config.head_dim if getattr(model.config, "head_dim", None) else 8
    model.save_pretrained(tmp_path)
    weights, per_layer = load_file(tmp_path / "model.safetensors"), {}
    for layer, (kv_heads, group, width) in KEPT.items():
        rows = [g * 3 + q for g in kv_heads for q in range(group)]
        _cut(weights, f"model.layers.{layer}.", rows, kv_heads, width, dim)
        per_layer[f"{layer}"] = {
            "num_attention_heads": len(rows), "num_key_value_heads": len(kv_heads), "intermediate_size": width,
        }  # fmt: skip
        block = model.model.layers[layer]
        with torch.no_grad():  # what is not kept feeds nothing
            dead = [i for i in range(6 * dim) if i // dim not in rows]
            block.self_attn.o_proj.weight[:, dead] = 0
            block.mlp.down_proj.weight[:, width:] = 0
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "per_layer_config": per_layer}))
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    ours = PagedSequences(load(tmp_path, torch.float32))
    got = torch.cat([ours.step({"a": PROMPT[:11]})[0], ours.step({"a": PROMPT[11:]})[0]])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def _cut(
    weights: dict[str, torch.Tensor], prefix: str, rows: list[int], kv_heads: list[int], width: int, dim: int
) -> None:
    def of(heads: list[int]) -> torch.Tensor:
        return torch.tensor([h * dim + d for h in heads for d in range(dim)], dtype=torch.int64)

    for name in list(weights):
        if not name.startswith(prefix):
            continue
        if ".q_proj." in name:
            weights[name] = weights[name][of(rows)].contiguous()
        elif ".k_proj." in name or ".v_proj." in name:
            weights[name] = weights[name][of(kv_heads)].contiguous()
        elif ".o_proj." in name:
            weights[name] = weights[name][:, of(rows)].contiguous()
        elif "gate_proj" in name or "up_proj" in name:
            weights[name] = weights[name][:width].contiguous()
        elif "down_proj" in name:
            weights[name] = weights[name][:, :width].contiguous()
