"""Step costs: how long a step takes, without running it. The first tier: a line fitted to measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class LinearStepCost:
    """seconds = fixed + token * num_tokens + kv * kv_tokens + request * num_requests (SmartSpec, section 4.2,
    whose line has the first three terms)."""

    fixed: float
    token: float
    kv: float
    request: float = 0.0

    def seconds(self, num_tokens: int, kv_tokens: int, num_requests: int) -> float:
        return self.fixed + self.token * num_tokens + self.kv * kv_tokens + self.request * num_requests


# Llama-3.1-8B on one H100, as published with SmartSpec by its authors (arXiv 2406.14066 v3).
H100_LLAMA_8B = LinearStepCost(fixed=5.886e-3, token=2.101e-5, kv=3.926e-8)


def fit_linear(rows: Sequence[tuple[int, int, int, float]]) -> LinearStepCost:
    """Non-negative least squares over (num_tokens, kv_tokens, num_requests, seconds) of measured steps.

    Raises UsageError when there are fewer rows than coefficients.
    """
    if len(rows) < 4:
        raise UsageError(f"A step cost needs at least 4 measured steps, not {len(rows)}.")
    from scipy.optimize import nnls

    data = np.asarray(rows, dtype=np.float64)
    features = np.column_stack([np.ones(len(data)), data[:, :3]])
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    coefficients = nnls(features / scale, data[:, 3])[0] / scale
    return LinearStepCost(*(float(c) for c in coefficients))
