"""What a pruned model's layers have fewer of: transformers' `per_layer_config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtool.errors import ModelError
from llmtool.modelspec.config import Config
from llmtool.modelspec.mlps import MlpSpec
from llmtool.modelspec.parts import AttentionSpec, DenseSpec

_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def read_per_layer(
    config: Config, attention: AttentionSpec, mlps: Sequence[MlpSpec]
) -> list[tuple[AttentionSpec | None, MlpSpec]]:
    """Of each layer its own attention, or None where it has the model's, and its MLP.

    Raises ModelError for an entry that names no layer, asks for more than the model has, or does not run here.
    """
    given = config.get("per_layer_config") or {}
    if not isinstance(given, dict) or not all(isinstance(entry, dict) for entry in given.values()):
        raise ModelError("config.json: per_layer_config must map numbers of layers to their fields.")
    entries = {_layer(key, len(mlps)): entry for key, entry in given.items()}
    return [
        (_attention(i, entries.get(i, {}), attention), _mlp(i, entries.get(i, {}), mlp))
        for i, mlp in enumerate(mlps)
    ]


def _layer(key: str, layers: int) -> int:
    if not key.isdecimal() or int(key) >= layers:
        raise ModelError(f"config.json: per_layer_config names layer {key!r} of {layers}.")
    return int(key)


def _attention(layer: int, entry: Mapping[str, Any], a: AttentionSpec) -> AttentionSpec | None:
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise ModelError(
            f"config.json: per_layer_config changes {', '.join(unknown)} of layer {layer}, which does not run here."
        )
    kv_heads = _count(layer, entry, "num_key_value_heads", a.num_kv_heads)
    heads = _count(layer, entry, "num_attention_heads", a.num_heads)
    if (heads, kv_heads) == (a.num_heads, a.num_kv_heads):
        return None
    if a.latent is not None or a.qk_norm == "all" or a.sinks:
        raise ModelError(
            f"config.json: layer {layer} has heads of its own, which this family does not run with."
        )
    if bool(heads) != bool(kv_heads) or heads % max(kv_heads, 1):
        raise ModelError(
            f"config.json: layer {layer} has {heads} query heads, not a multiple of its {kv_heads} KV heads."
        )
    if not heads and a.o_bias:
        raise ModelError(
            f"config.json: layer {layer} has no heads but a bias after them, which does not run here."
        )
    return replace(a, num_heads=heads, num_kv_heads=kv_heads)


def _mlp(layer: int, entry: Mapping[str, Any], mlp: MlpSpec) -> MlpSpec:
    if "intermediate_size" not in entry:
        return mlp
    if not isinstance(mlp, DenseSpec):
        raise ModelError(f"config.json: layer {layer} is a mixture of experts and has a width of its own.")
    width = _count(layer, entry, "intermediate_size", mlp.intermediate_size)
    return replace(mlp, intermediate_size=width)


def _count(layer: int, entry: Mapping[str, Any], key: str, most: int) -> int:
    value = entry.get(key, most)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ModelError(
            f"config.json: {key} of layer {layer} must be an integer from 0 to {most}, and is {value!r}."
        )
    return value
