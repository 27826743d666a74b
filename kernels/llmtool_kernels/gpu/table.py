"""Launch configurations of attention, by table: what was chosen, for which shapes, and why.

Decoding streams KV: what counts is bytes in flight (4.3 TB/s x 0.8 us = 26 KB per multiprocessor of an H200) and
two programs per multiprocessor, so that one loads while the other finishes a tile. Prompt chunks compute: wide
tiles on wgmma, which takes 64 rows or more, one program each.

That is for Hopper. GPUs with less shared memory get smaller steps: they have less bandwidth to keep busy, too, and
older tensor cores. Those tables were compiled for, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Bytes of shared memory a program may have: on sm_90 and sm_100; on sm_80; on sm_86, sm_89 and sm_120. By the
# "technical specifications per compute capability" of the CUDA programming guide.
HOPPER, AMPERE, SMALL = 227 * 1024, 163 * 1024, 99 * 1024
MAX_NARROW = 64  # rows; sequences with more in a step are cut into wide tiles


@dataclass(frozen=True, slots=True)
class Config:
    """block_m: rows of a tile; block_n: tokens read at a time; per_processor: programs beside each other."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    per_processor: int
    phases: bool = False  # blocks without a mask in a loop of their own: costs decoding, pays for chunks


def fits(k_dim: int, itemsize: int, shared_memory: int) -> bool:
    """Whether `choose` has a configuration: not for DeepSeek's rows in float32 where shared memory is small."""
    return shared_memory >= (AMPERE if itemsize == 4 and k_dim > 256 else SMALL)


def choose(
    max_rows: int, k_dim: int, v_dim: int, itemsize: int, kv_itemsize: int, shared_memory: int = HOPPER
) -> Config:
    """For tiles of sequences of at most max_rows (query, head of the group) rows.

    k_dim, v_dim: of a head; itemsize, kv_itemsize: bytes per element of queries and of what is cached;
    shared_memory: bytes a program may have, for which the shape `fits`.
    """
    block_m = next((m for m in (16, 32, 64) if max_rows <= m), 0)
    if itemsize == 4:
        return _float32(block_m, k_dim)
    if k_dim > 256 or v_dim > 256:
        return _latent(block_m, shared_memory)
    wide = _WIDE if shared_memory >= HOPPER else _WIDE_OLDER
    if not block_m:
        return (_WIDE_FLOAT8 if kv_itemsize == 1 else wide)[_bucket(k_dim)]
    if block_m == 64 and k_dim > 128:
        return _WIDE_FLOAT8[256] if kv_itemsize == 1 else Config(64, 32, 8, 3, 1)
    narrow = replace(_NARROW[_bucket(k_dim)], block_m=block_m)
    if kv_itemsize == 1 and block_m == 64:
        return replace(narrow, block_n=64 if shared_memory >= HOPPER else 32)
    if shared_memory >= HOPPER or (shared_memory >= AMPERE and block_m < 64 and block_m * k_dim < 32 * 256):
        return narrow
    # Two programs still fit beside each other, and few enough registers for mma's sums are left.
    stages = 5 if shared_memory >= AMPERE or block_m * k_dim < 64 * 128 else 3
    return replace(narrow, block_n=narrow.block_n // 2, num_stages=stages)


def _bucket(k_dim: int) -> int:
    return next(bound for bound in (64, 128, 256) if k_dim <= bound)


# Tokens x (K + V) x 2 bytes: 32 KB a step, two steps under way beside the one computed, two programs a processor.
# Tables are loaded two steps ahead of the tokens they point at, which takes two of the five stages.
_NARROW = {
    64: Config(16, 128, 4, 5, 2),
    128: Config(16, 64, 4, 5, 2),
    256: Config(16, 32, 4, 5, 2),
}
# As many rows and tokens as fit in 255 registers a thread beside the sums.
_WIDE = {
    64: Config(128, 64, 8, 3, 1, phases=True),
    128: Config(128, 64, 8, 3, 1, phases=True),
    256: Config(64, 32, 8, 3, 1, phases=True),
}
# The same for mma, whose operands take registers too.
_WIDE_OLDER = {**_WIDE, 128: Config(64, 64, 8, 3, 1, phases=True)}
# Float8 is widened in registers on its way to tensor cores, which leaves fewer for the sums.
_WIDE_FLOAT8 = {
    64: _WIDE[64],
    128: Config(64, 64, 8, 3, 1, phases=True),
    256: Config(32, 32, 8, 3, 1),
}


def _latent(block_m: int, shared_memory: int) -> Config:
    """DeepSeek's rows of 512 + 64. More than 32 query heads a tile would not leave registers for the sums; the
    tiles of a group run beside each other, so that what they share comes from L2."""
    few = Config(16 if block_m == 16 else 32, 32, 8, 5, 1)
    return few if shared_memory >= AMPERE else replace(few, block_n=16, num_stages=3)


def _float32(block_m: int, k_dim: int) -> Config:
    """For checking models, not for serving them: products on tensor cores in three tf32 passes."""
    if k_dim > 128:
        return Config(16, 16, 8, 2, 1)
    return Config(min(block_m or 32, 32), 32, 4, 2, 1)
