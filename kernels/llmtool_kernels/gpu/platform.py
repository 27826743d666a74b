"""What the kernels need to know of where they run."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

# The interpreter computes bfloat16 wrongly and says nothing, so there kernels widen whatever they load.
INTERPRETED: bool = triton.knobs.runtime.interpret
WIDEN = tl.constexpr(INTERPRETED)
_E4M3 = tl.constexpr(448.0)  # the largest finite numbers of float8
_E4M3_NAN = tl.constexpr(480.0)  # what the interpreter makes of NaN's bits
_E5M2 = tl.constexpr(57344.0)
_ROUND = tl.constexpr(1.5 * 2**23)  # float32 has no digits left behind the point beside it
_INTERPRETED_PROCESSORS = 3  # so that tests see work cut in pieces


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a few where kernels are interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may have on a CUDA device; Hopper's where kernels are interpreted."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # whose stubs do not know all of them
    return int(properties.shared_memory_per_block_optin)


def power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def wide(x):
    """x in float32, as kernels compute where they are interpreted. Of float8, the interpreter knows no NaN."""
    y = x.to(tl.float32)
    if x.dtype.is_fp8():
        LIMIT: tl.constexpr = _E4M3 if x.dtype == tl.float8e4nv else _E5M2
        y = tl.where(tl.abs(y) > LIMIT, float("nan"), y)
    return y


@triton.jit
def stored(x, inverse_scale, given: tl.constexpr, dtype: tl.constexpr):
    """float32 x as an element of dtype: of float8, first rounded to `given`, scaled and clamped to what is finite.

    As `llmtool_kernels.float8.encode`.
    """
    if not dtype.is_fp8():
        return x.to(dtype)
    LIMIT: tl.constexpr = _E4M3 if dtype == tl.float8e4nv else _E5M2
    y = rounded(x, given) * inverse_scale
    y = tl.clamp(y, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if WIDEN:  # the interpreter loses what rounding carries over, so it is given numbers that need none
        DIGITS: tl.constexpr = 3 if dtype == tl.float8e4nv else 2
        LOWEST: tl.constexpr = -6 if dtype == tl.float8e4nv else -14
        exponent = tl.maximum((y.to(tl.int32, bitcast=True) >> 23 & 255) - 127, LOWEST)
        unit = tl.exp2((exponent - DIGITS).to(tl.float32))
        whole = (y / unit + _ROUND) - _ROUND
        y = tl.where(y == y, whole * unit, _E4M3_NAN if dtype == tl.float8e4nv else 2 * LIMIT)
    return y.to(dtype)


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
