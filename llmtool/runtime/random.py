"""One random number per (request seed, position of the token being sampled), whatever else is in the batch.

A counter-based generator has no state to carry: the number depends on its two arguments only, so a request
samples the same tokens alone, in any batch, after a preemption, and whether or not a draft guessed the token.
The mixer is SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), which passes BigCrush over a counter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: SplitMix64's step


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function, a bijection: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, one per row.

    seeds, positions: [S]. The seed is mixed before the position is added, so that the streams of neighbouring
    seeds (the n answers of one request) are not shifted copies of each other.
    """
    keys = splitmix64(seeds + GAMMA)
    bits = splitmix64(keys + (positions.astype(np.uint64) + np.uint64(1)) * GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
