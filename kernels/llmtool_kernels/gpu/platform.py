"""What the kernels need to know of where they run."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

# The interpreter computes bfloat16 wrongly and says nothing, so there kernels widen whatever they load.
INTERPRETED: bool = triton.knobs.runtime.interpret
WIDEN = tl.constexpr(INTERPRETED)
_INTERPRETED_PROCESSORS = 3  # so that tests see work cut in pieces


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a few where kernels are interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def load32(pointers, mask=None):
    """Load as float32, 0 where masked."""
    if mask is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x with no more digits than dtype has, as where torch stores a result between two operations."""
    if WIDEN:
        return x
    return x.to(dtype).to(tl.float32)
