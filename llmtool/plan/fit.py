"""Fitting an engine's constants to measured runs: maximum a posteriori, from a profile as the prior.

A bench run says little about each constant alone, so each may leave its prior only as far as the run makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtool.sim.engines import EngineProfile
from llmtool.sim.simulate import SimResult

# Standard deviation of the logarithm of each constant before anything is measured.
PRIORS: Mapping[str, float] = {
    "host_step": 0.5,
    "host_seq": 1.0,
    "compute": 0.15,
    "memory": 0.07,
    "network": 0.3,
    "attention": 0.3,
    "request": 0.7,
}
# Standard deviation of a measured figure's logarithm. TTFT also hangs on the client.
SIGMAS: Mapping[str, float] = {"tpot": 0.015, "ttft": 0.06, "e2el": 0.02, "throughput": 0.02}
_PERCENTILE = re.compile(r"(ttft|tpot|e2el)_p(\d+)")
HOST_FREEDOM = 3.0
_BLUR = 2.0  # a percentile is so much less certain than a mean


@dataclass(frozen=True, slots=True)
class Observation:
    """simulate: the run under a profile. measured: figures in milliseconds (ttft, tpot, e2el: means; tpot_tokens:
    mean over tokens instead of requests; tpot_p90 and the like: percentiles) or output tokens per second
    (throughput)."""

    simulate: Callable[[EngineProfile], SimResult]
    measured: Mapping[str, float]


def figure(result: SimResult, name: str) -> float:
    if name == "throughput":
        return result.output_throughput
    if name == "tpot_tokens":
        tokens = sum(f.output_tokens for f in result.finished)
        return sum(f.finished - f.first_token for f in result.finished) / tokens * 1e3
    found = _PERCENTILE.fullmatch(name)
    if found:
        return result.statistic(found[1], float(found[2]))
    return result.statistic(name, None)


def _sigma(name: str) -> float:
    found = _PERCENTILE.fullmatch(name)
    return SIGMAS[found[1]] * _BLUR if found else SIGMAS[name.removesuffix("_tokens")]


def fit_engine(
    base: EngineProfile,
    observations: Sequence[Observation],
    constants: Sequence[str] = tuple(PRIORS),
    evaluations: int = 8,
    freedom: float = 1.0,
) -> EngineProfile:
    """The profile that makes the observations most likely. constants: those that may change. freedom: widens the
    priors of kernels and collectives, and, up to HOST_FREEDOM, those of the host."""
    from scipy.optimize import least_squares

    start = np.array([max(getattr(base, name), 1e-7) for name in constants])
    free = dict.fromkeys(("compute", "memory", "network"), freedom)
    free |= {name: min(freedom, HOST_FREEDOM) for name in ("host_step", "host_seq")}
    widths = np.array([PRIORS[name] * free.get(name, 1.0) for name in constants])

    def profile(x: NDArray[np.float64]) -> EngineProfile:
        values = start * np.exp(x * widths)
        changes: dict[str, Any] = {n: float(v) for n, v in zip(constants, values, strict=True)}
        return replace(base, **changes)

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        engine, out = profile(x), []
        for o in observations:
            result = o.simulate(engine)
            for name, value in o.measured.items():
                out.append(np.log(max(figure(result, name), 1e-9) / value) / _sigma(name))
        return np.array([*out, *x])

    # Steps of differences are relative: around 2 they are a tenth of a prior's width, around 0 nothing.
    middle = 2.0
    starts = [np.zeros(len(start))]
    if (
        freedom > 1.0 and "host_seq" in constants
    ):  # a host that is felt per sequence is far from one that is not
        starts.append(np.array([1.0 if name == "host_seq" else 0.0 for name in constants]))
    found = min(
        (
            least_squares(
                lambda z: residuals(z - middle), x + middle, bounds=(middle - 6.0, middle + 6.0), diff_step=0.05,
                x_scale=1.0, max_nfev=evaluations,
            )
            for x in starts
        ),
        key=lambda fit: float(fit.cost),
    )  # fmt: skip
    return profile(found.x - middle)
