"""Scales of keys and values in eight bits, as quantised checkpoints bring them: a number per layer or per head."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from llmtool.errors import ModelError

# compressed-tensors puts them beside the projections, ModelOpt into them; kv_scale, for both, is AutoFP8's.
_NAME = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?:(?:k_proj|v_proj|qkv_proj|attn)\.)?(?P<kind>[kv]|kv)_scale"
)


def is_kv_scale(name: str) -> bool:
    """Whether a checkpoint's tensor, by its canonical name, is one."""
    return _NAME.fullmatch(name) is not None


def kv_scales(tensors: Iterable[tuple[str, Tensor]]) -> dict[int, tuple[float, float]]:
    """Layer -> what its keys and its values are divided by before they are stored; 1 for what is not told.

    Of several numbers, one per head, the largest: with it no head is clamped.
    """
    found: dict[int, dict[str, float]] = {}
    for name, tensor in tensors:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        scale = tensor.float().max().item() if tensor.numel() else math.nan
        found.setdefault(int(match["layer"]), {})[match["kind"]] = scale
    return {
        layer: (given.get("k", given.get("kv", 1.0)), given.get("v", given.get("kv", 1.0)))
        for layer, given in found.items()
    }


def checked(scales: Mapping[int, tuple[float, float]]) -> Mapping[int, tuple[float, float]]:
    """The same. Raises ModelError where one is no positive number: it is of no use, and hurts nobody unused."""
    for layer, pair in scales.items():
        for kind, scale in zip(("keys", "values"), pair, strict=True):
            if not (math.isfinite(scale) and scale > 0):
                raise ModelError(
                    f"The checkpoint's scale of layer {layer}'s {kind} is {scale:g}, which is no positive number.",
                    "Leave out --kv-cache-dtype, or make the checkpoint's scales again.",
                )
    return scales
