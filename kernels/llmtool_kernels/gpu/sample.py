"""Drawing tokens from logits without sorting: temperature, min-p, top-k, top-p, then inverse CDF over token ids.

The random number of a row depends on its request's seed and its position only (SplitMix64, as in
llmtool.runtime.random), so a request draws the same tokens in any batch. A filter is one number per row, the
smallest logit that stays. It is found by bisection over the ordered bits of float32, four bits a pass: how many
logits, or how much weight, lie at or above each of sixteen bounds. Eight passes settle any vocabulary, with ties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmtool_kernels.gpu.platform import power_of_2

BLOCK = 4096  # logits of a row a program looks at a time
BOUND_BLOCK = 1024  # the same beside sixteen bounds
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _splitmix64(x):
    x = (x ^ (x >> 30)) * _MIX1
    x = (x ^ (x >> 27)) * _MIX2
    return x ^ (x >> 31)


@triton.jit
def uniform(seed, position):
    """Uniform float64 in [0, 1) with 53 bits. seed, position: int64."""
    gamma = tl.full([], _GAMMA, tl.uint64)
    key = _splitmix64(seed.to(tl.uint64, bitcast=True) + gamma)
    bits = _splitmix64(key + (position.to(tl.uint64, bitcast=True) + 1) * gamma)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _ordered(x):
    """uint32 in the order of float32 x; no NaN among them."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def _scaled(x, d, peak, temperature, VOCAB: tl.constexpr):
    """Logits less their largest, over the temperature: what the filters and weights are made of."""
    z = (tl.load(x + d, mask=d < VOCAB, other=float("-inf")).to(tl.float32) - peak) / temperature
    return tl.where(d < VOCAB, z, float("-inf"))


@triton.jit
def _bound(
    x, peak, temperature, floor, target, WEIGHED: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key so that keys at or above it, and above `floor`, hold at least `target` of what is counted."""
    low = tl.full([], 0, tl.uint32)
    steps = tl.arange(0, 16)
    shift = 28
    for _ in range(8):
        bounds = low + (steps << shift).to(tl.uint32)  # [16]
        sums = tl.zeros([BLOCK, 16], tl.float32)  # added up per thread, and over threads once a pass
        for start in range(0, VOCAB, BLOCK):
            z = _scaled(x, start + tl.arange(0, BLOCK), peak, temperature, VOCAB)
            key = _ordered(z)
            one = tl.exp(z) if WEIGHED else tl.where(z > float("-inf"), 1.0, 0.0)
            one = tl.where(key >= floor, one, 0.0)
            sums += tl.where(key[:, None] >= bounds[None, :], one[:, None], 0.0)
        held = tl.sum(sums.to(tl.float64), 0)  # [16]
        # The first bound holds all that is left, so one of them always qualifies.
        place = tl.max(tl.where((held >= target) | (steps == 0), steps, 0), 0)
        low = low + (place << shift).to(tl.uint32)
        shift -= 4
    return low


@triton.jit
def sample_kernel(
    tokens, logits, seeds, positions, temperatures, top_k, top_p, log_min_p, row_stride,
    VOCAB: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr,
    BOUND_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (S,), a row each. logits: float32 [S, VOCAB]; top_k 0, top_p 1 and log_min_p -inf filter nothing."""
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * row_stride
    temperature = tl.load(temperatures + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        d = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(x + d, mask=d < VOCAB, other=float("-inf")).to(tl.float32))
    peak = tl.max(best, 0)

    floor = tl.full([], 0, tl.uint32)
    if FILTER:
        floor = _ordered(tl.load(log_min_p + row))
        k = tl.load(top_k + row)
        if k > 0:
            bound = _bound(x, peak, temperature, 0, k.to(tl.float64), False, VOCAB, BOUND_BLOCK)
            floor = tl.maximum(floor, bound)
        p = tl.load(top_p + row)
        if p < 1.0:
            mass = tl.full([], 0.0, tl.float64)
            for start in range(0, VOCAB, BLOCK):
                z = _scaled(x, start + tl.arange(0, BLOCK), peak, temperature, VOCAB)
                mass += tl.sum(tl.where(_ordered(z) >= floor, tl.exp(z), 0.0), 0).to(tl.float64)
            bound = _bound(x, peak, temperature, floor, p * mass, True, VOCAB, BOUND_BLOCK)
            floor = tl.maximum(floor, bound)

    total = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        z = _scaled(x, start + tl.arange(0, BLOCK), peak, temperature, VOCAB)
        total += tl.sum(tl.where(_ordered(z) >= floor, tl.exp(z), 0.0).to(tl.float64), 0)
    target = uniform(tl.load(seeds + row), tl.load(positions + row)) * total

    # The first id whose CDF exceeds the target; rounding may leave none, then the last id with weight.
    chosen = tl.full([], VOCAB, tl.int32)
    last = tl.full([], 0, tl.int32)
    before = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        d = start + tl.arange(0, BLOCK)
        z = _scaled(x, d, peak, temperature, VOCAB)
        weight = tl.where(_ordered(z) >= floor, tl.exp(z), 0.0).to(tl.float64)
        cdf = before + tl.cumsum(weight, 0)
        chosen = tl.minimum(chosen, tl.min(tl.where((cdf > target) & (weight > 0), d, VOCAB), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, d, 0), 0))
        before += tl.sum(weight, 0)
    tl.store(tokens + row, tl.where(chosen < VOCAB, chosen, last).to(tl.int64))


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Tokens int64 [S] of logits [S, V], one each; never waits for the device.

    seeds (their bits), positions: int64 [S]; temperatures: float32 [S]. filters: top_k int64 (0 off), top_p float64
    (1 off), log_min_p float32 (-inf off), each [S]; None where no row has any. A row whose logits are all -inf or
    hold NaN gets some token; whoever samples checks its largest logit. The reference is `sample_reference`.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    assert logits.stride(1) == 1
    if len(logits):
        sample_kernel[(len(logits),)](
            *arguments(tokens, logits, seeds, positions, temperatures, filters),
            **constants(logits, filters),
            num_warps=NUM_WARPS,
        )
    return tokens


NUM_WARPS = 16  # a row is one program's: as many loads under way as it can have


def arguments(
    tokens: Tensor,
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[object, ...]:
    top_k, top_p, log_min_p = filters or (positions, temperatures, temperatures)
    row = logits.stride(0)
    return (tokens, logits, seeds, positions, temperatures, top_k, top_p, log_min_p, row)


def constants(logits: Tensor, filters: tuple[Tensor, Tensor, Tensor] | None) -> dict[str, object]:
    padded = power_of_2(logits.shape[1])
    return {
        "VOCAB": logits.shape[1],
        "FILTER": filters is not None,
        "BLOCK": min(BLOCK, padded),
        "BOUND_BLOCK": min(BOUND_BLOCK, padded),
    }


def sample_reference(
    logits: Tensor,
    uniforms: Tensor,
    temperatures: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The same from given random numbers float64 [S], by sorting; rows one by one."""
    tokens = []
    for i, row in enumerate(logits.double()):
        z = (row - row.max()) / temperatures[i]
        keep = torch.ones_like(z, dtype=torch.bool)
        if filters is not None:
            top_k, top_p, log_min_p = (f[i].item() for f in filters)
            keep &= z >= log_min_p
            if top_k:
                keep &= z >= z.sort(descending=True).values[int(top_k) - 1]
            if top_p < 1:
                ordered = z.masked_fill(~keep, float("-inf")).sort(descending=True).values
                cdf = ordered.exp().cumsum(0)
                keep &= z >= ordered[int(torch.searchsorted(cdf, top_p * cdf[-1]))]
        cdf = (z.exp() * keep).cumsum(0)
        tokens.append(torch.searchsorted(cdf, uniforms[i] * cdf[-1], right=True).clamp(max=len(z) - 1))
    return torch.stack(tokens)
