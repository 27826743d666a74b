"""per_layer_config: heads and widths of a pruned model's layers, and refusals of entries that make no sense."""

from __future__ import annotations

from typing import Any

import pytest

from llmtool.core.memory.geometry import uniform_group
from llmtool.errors import ModelError
from llmtool.modelspec import DenseSpec, ModelSpec
from tests.modelspec.published import LLAMA_31_8B

PER_LAYER: dict[str, Any] = {
    "00": {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 1000},
    "03": {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 0},
    "07": {"num_attention_heads": 16},
}


def spec_of(per_layer: Any) -> ModelSpec:
    return ModelSpec.from_config({**LLAMA_31_8B, "per_layer_config": per_layer})


def test_layers_have_heads_and_widths_of_their_own() -> None:
    spec = spec_of(PER_LAYER)
    shapes = [(spec.attention_of(x).num_heads, spec.attention_of(x).num_kv_heads) for x in spec.layers]
    assert shapes[:9] == [(16, 4), (32, 8), (32, 8), (0, 0), (32, 8), (32, 8), (32, 8), (16, 8), (32, 8)]
    assert [x.mlp.intermediate_size for x in spec.layers if isinstance(x.mlp, DenseSpec)][:5] == [
        1000, 14336, 14336, 0, 14336,
    ]  # fmt: skip
    assert (spec.num_heads, spec.num_kv_heads, spec.intermediate_size) == (32, 8, 14336)


def test_parameters_and_cache_shrink_by_what_was_removed() -> None:
    dense, pruned = ModelSpec.from_config(LLAMA_31_8B), spec_of(PER_LAYER)
    hidden, dim, inner = 4096, 128, 14336
    head, kv_head, neuron = 2 * hidden * dim, 2 * hidden * dim, 3 * hidden
    removed = (16 + 32 + 16) * head + (4 + 8) * kv_head + (inner - 1000 + inner) * neuron
    assert dense.num_parameters - pruned.num_parameters == removed
    caches = pruned.layer_cache_specs(2)
    assert [c.layer for c in caches] == [i for i in range(32) if i != 3]
    assert uniform_group(caches, 16).bytes_per_token == (4 + 30 * 8) * 2 * dim * 2


@pytest.mark.parametrize(
    ("per_layer", "says"),
    [
        ({"32": {}}, "layer '32' of 32"),
        ({"0": {"num_key_value_heads": 9}}, "from 0 to 8"),
        ({"0": {"intermediate_size": -1}}, "from 0 to 14336"),
        ({"0": {"num_attention_heads": 0}}, "not a multiple"),
        ({"0": {"num_attention_heads": 12}}, "not a multiple"),
        ({"0": {"head_dim": 64}}, "changes head_dim"),
        ([1], "must map"),
    ],
)
def test_refuses_entries_that_make_no_sense(per_layer: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        spec_of(per_layer)
