"""Rotary embeddings as config.json gives them: `rope_parameters` (transformers 5), perhaps one table per type of
layer, or `rope_theta` and `rope_scaling` (transformers 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmtool.errors import ModelError
from llmtool.modelspec.config import Config, number, numbers
from llmtool.modelspec.parts import DEFAULT_THETA, RopeSpec

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def read_ropes(config: Config, head_dim: int) -> dict[str, RopeSpec]:
    """The rotary embedding of full_attention and of sliding_attention layers, one and the same in most models."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if FULL in new or SLIDING in new:
        tables = {kind: new.get(kind) or {} for kind in (FULL, SLIDING)}
    else:
        tables = {kind: {**old, **new} for kind in (FULL, SLIDING)}
    return {kind: rope(config, table, head_dim) for kind, table in tables.items()}


def rope(config: Config, table: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """One embedding. table: its parameters; what it does not say is looked up in the rest of config.json."""
    fields = {**config.fields, **table}
    kind = str(table.get("rope_type") or table.get("type") or "default")
    if kind in ("su", "yarn") and "short_factor" in table:
        kind = "longrope"  # names that Phi-3 had for it first
    theta = number(fields, "rope_theta", DEFAULT_THETA)
    partial = number(fields, "partial_rotary_factor", 1.0)
    dim = int(head_dim * partial)
    if not 0 < partial <= 1 or dim % 2 or not dim:
        raise ModelError(
            f"config.json: partial_rotary_factor is {partial:g}, which turns {dim} of {head_dim} dimensions; "
            "it must be an even number of them."
        )
    if kind not in _KINDS:
        raise ModelError(
            f"The rope type {kind!r} does not run here; {', '.join(_KINDS)} do.",
            "Take rope_scaling out of config.json to run the model at its original context length.",
        )
    if kind == "default":
        return RopeSpec(dim, theta)
    if kind in ("linear", "dynamic"):
        return RopeSpec(dim, theta, kind, number(table, "factor"))
    # Phi-3 keeps the length it was trained on outside of the table, and means it first.
    original = config.get("original_max_position_embeddings") or table.get("original_max_position_embeddings")
    fallback = config.count("max_position_embeddings")
    length = int(
        number({"original_max_position_embeddings": original}, "original_max_position_embeddings", fallback)
    )
    if kind == "llama3":
        return RopeSpec(
            dim,
            theta,
            kind,
            number(table, "factor"),
            length,
            low_freq_factor=number(table, "low_freq_factor"),
            high_freq_factor=number(table, "high_freq_factor"),
        )
    stretch = number(table, "factor", config.count("max_position_embeddings") / length)
    return (
        _yarn(table, dim, theta, stretch, length)
        if kind == "yarn"
        else _longrope(table, dim, theta, stretch, length)
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """How much longer contexts sharpen attention (YaRN, equation 22, with DeepSeek's weight)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(table: Mapping[str, Any], dim: int, theta: float, factor: float, original: int) -> RopeSpec:
    mscale, mscale_all = number(table, "mscale", 0.0), number(table, "mscale_all_dim", 0.0)
    magnitude = yarn_magnitude(factor)
    if mscale and mscale_all:
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all)
    truncate = table.get("truncate")
    return RopeSpec(
        dim,
        theta,
        "yarn",
        factor,
        original,
        attention_factor=number(table, "attention_factor", magnitude),
        beta_fast=number(table, "beta_fast", 32.0) or 32.0,
        beta_slow=number(table, "beta_slow", 1.0) or 1.0,
        truncate=True if truncate is None else bool(truncate),
    )


def _longrope(table: Mapping[str, Any], dim: int, theta: float, factor: float, original: int) -> RopeSpec:
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        dim,
        theta,
        "longrope",
        factor,
        original,
        attention_factor=number(table, "attention_factor", magnitude),
        short_factors=numbers(table, "short_factor", dim // 2),
        long_factors=numbers(table, "long_factor", dim // 2),
    )
