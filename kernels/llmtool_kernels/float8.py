"""Keys and values in eight bits: E4M3 and E5M2 of arXiv 2209.05433, section 3, and OCP's 8-bit floating point.

An element is stored as x / scale, clamped to the finite numbers of the format: what lies beyond them would become
NaN or infinite. A scale never touches what is read: a key's is part of the softmax's, a value's of the sum's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """uint8, of x's shape: x / scale rounded to the nearest, ties to even. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return (x.float() * (1.0 / scale)).clamp(-limit, limit).to(dtype).view(torch.uint8)


def decode(stored: Tensor, dtype: torch.dtype, to: torch.dtype) -> Tensor:
    """The numbers behind these bytes, in `to`, without their scale: exact in float32, bfloat16 and float16."""
    return stored.view(dtype).to(to)
