"""When requests arrive: offsets in seconds after the first, ascending, from a Generator passed in.

A closed loop has no arrival process of its own: it is `at_once` behind a limit on concurrency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmtool.errors import UsageError

Offsets = NDArray[np.float64]


def at_once(n: int) -> Offsets:
    """All `n` requests at time 0 (a request rate of infinity)."""
    return np.zeros(n)


def gamma(n: int, rate: float, burstiness: float, rng: np.random.Generator) -> Offsets:
    """Gaps from a gamma distribution of mean 1/rate and shape `burstiness`, vLLM's meaning of the word.

    1 is a Poisson process, below 1 is burstier, above 1 more regular, infinity a constant gap: the gaps'
    coefficient of variation is 1/sqrt(burstiness). Gaps are scaled so that their mean over the run is exactly
    1/rate: otherwise a short run offers a load several percent off the one asked for (a Poisson process given
    its number of events in a span is still one).
    """
    if not rate > 0:
        raise UsageError(f"The request rate must be positive, not {rate:g}.")
    if not burstiness > 0:
        raise UsageError(f"burstiness must be positive, not {burstiness:g}.", "1 is a Poisson process.")
    if math.isinf(rate) or n < 2:
        return at_once(n)
    if math.isinf(burstiness):
        return np.arange(n) / rate
    gaps = rng.gamma(shape=burstiness, scale=1.0 / burstiness, size=n - 1)
    total = gaps.sum()
    # A tiny shape can underflow every gap to zero: then the whole burst comes at the end of its span.
    gaps = gaps / total if total > 0 else np.eye(1, n - 1)[0]
    return np.concatenate(([0.0], np.cumsum(gaps * ((n - 1) / rate))))


def poisson(n: int, rate: float, rng: np.random.Generator) -> Offsets:
    return gamma(n, rate, 1.0, rng)


def constant(n: int, rate: float) -> Offsets:
    return gamma(n, rate, math.inf, np.random.default_rng(0))


def ramp(n: int, start_rate: float, end_rate: float, burstiness: float, rng: np.random.Generator) -> Offsets:
    """The rate grows (or falls) linearly from `start_rate` to `end_rate` requests/s over the run.

    The run's span T follows from n = (start + end) / 2 * T. A unit-rate process u is mapped through the
    inverse of the cumulative rate L(t) = a t + (b - a) t^2 / (2 T), which keeps its burstiness at every rate.
    """
    a, b = float(start_rate), float(end_rate)
    if not (0 <= a < math.inf and 0 <= b < math.inf and a + b > 0):
        raise UsageError(
            f"A ramp needs two finite rates, at least one above zero, not {start_rate:g} and {end_rate:g}."
        )
    if n < 2:
        return at_once(n)
    unit = gamma(n, 1.0, burstiness, rng)  # [n], from 0 to n - 1 at unit rate
    span = 2.0 * (n - 1) / (a + b)
    slope = (b - a) / span
    # t = (sqrt(a^2 + 2 slope u) - a) / slope, written so that slope = 0 is no special case.
    root = np.sqrt(np.maximum(a * a + 2.0 * slope * unit, 0.0))
    denominator = a + root
    return np.divide(2.0 * unit, denominator, out=np.zeros(n), where=denominator > 0)


def from_trace(arrivals: Sequence[float | None], speedup: float = 1.0) -> Offsets:
    """A trace's own arrival times (seconds), from its first request on, `speedup` times as fast."""
    if not speedup > 0:
        raise UsageError(f"The trace's speed-up must be positive, not {speedup:g}.")
    if any(a is None for a in arrivals):
        raise UsageError(
            "This dataset has no arrival times.",
            "Give a --request-rate, or use a timed trace (azure, mooncake).",
        )
    times = np.asarray(arrivals, dtype=np.float64)
    return (times - times[0]) / speedup if len(times) else times
