"""Quantised checkpoints made plain while they are read: MXFP4 (gpt-oss) and block-wise FP8 (DeepSeek-V3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmtool.errors import ModelError

# OCP Microscaling Formats 1.0, section 5.3.3: FP4 E2M1, sign in the highest bit.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127  # section 5.4: scales are powers of two, E8M0
_FP8_BLOCK = 128
_TYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}  # of quantised values


def plain_tensors(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, each pair of quantised values and scales joined into the plain tensor, in bfloat16.

    A part waits in memory for its other half. Raises ModelError when a half never comes.
    """
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        partner = _partner(name, tensor.dtype)
        if partner is None:
            yield name, tensor
        elif partner in waiting:
            other = waiting.pop(partner)
            yield _join(name, tensor, partner, other)
        else:
            waiting[name] = tensor
    if waiting:
        raise ModelError(
            f"The checkpoint has {', '.join(sorted(waiting)[:8])} without the other half (values and scales).",
            "Download it again.",
        )


def is_plain(name: str, dtype: str) -> bool:
    """Whether a tensor of a file is no half of a quantised one. dtype: as safetensors calls it."""
    return _partner(name, _TYPES.get(dtype)) is None


def plain_name(name: str) -> str:
    """The plain tensor that a stored one is, or is a half of."""
    for half, whole in (("_blocks", ""), ("_scales", ""), (".weight_scale_inv", ".weight")):
        if name.endswith(half):
            return name.removesuffix(half) + whole
    return name


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [..., rows, 32 * groups] of uint8 blocks [..., rows, groups, 16] and scales [..., rows, groups].

    A byte holds two values, the lower half first. Exact: an FP4 value times a power of two is a bfloat16.
    """
    values = torch.tensor([*_FP4, *(-x for x in _FP4)], dtype=torch.bfloat16, device=blocks.device)
    out = torch.empty((*blocks.shape, 2), dtype=torch.bfloat16, device=blocks.device)
    for half, codes in enumerate((blocks & 0x0F, blocks >> 4)):
        out[..., half] = values[codes.int()]
    exponents = (scales.int() - _SCALE_BIAS)[..., None, None]
    return torch.ldexp(out, exponents).to(torch.bfloat16).flatten(-3)


def dequantise_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 [rows, columns] of float8 weights and a float32 scale for each block of 128 x 128."""
    rows, columns = weight.shape
    wide = scale.repeat_interleave(_FP8_BLOCK, 0)[:rows].repeat_interleave(_FP8_BLOCK, 1)[:, :columns]
    return (weight.float() * wide).to(torch.bfloat16)


def _partner(name: str, dtype: torch.dtype | None) -> str | None:
    """The other half of a quantised tensor; None for a plain one."""
    for values, scales in (("_blocks", "_scales"), (".weight", ".weight_scale_inv")):
        if name.endswith(scales):
            return name.removesuffix(scales) + values
        if name.endswith(values) and dtype in _TYPES.values():
            return name.removesuffix(values) + scales
    return None


def _join(name: str, tensor: Tensor, other_name: str, other: Tensor) -> tuple[str, Tensor]:
    if name.endswith(("_scales", "_scale_inv")):
        name, tensor, other_name, other = other_name, other, name, tensor
    if name.endswith("_blocks"):  # gpt-oss multiplies by [in, out], and packs [out, in]
        return name.removesuffix("_blocks"), dequantise_mxfp4(tensor, other).transpose(-1, -2)
    return name, dequantise_fp8(tensor, other)
