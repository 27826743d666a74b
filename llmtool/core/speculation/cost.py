"""What a step takes, learned while it is served.

seconds = fixed + token * N + sum of hinges * max(0, N - knot) + kv * kv_tokens + depth * draft_depth, all
coefficients non-negative: SmartSpec's line (section 4.2) with convex bends in N, as a device has that is bound by
memory first and by arithmetic later. Steps are gathered in cells of like size whose means are kept, so that ten
thousand steps of one kind weigh as much as a few of another: recursive least squares forgets what it does not
see, and winds up at low load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtool.core.speculation.draft import Floats, Ints
from llmtool.errors import UsageError

KNOTS = np.array([8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 512.0])
REFIT = 16  # steps between fits
CLIP = 3.0  # a step counts as at most so many times its cell's mean, or at least one part in so many
CELL_MEMORY = 64  # steps that a cell's mean looks back on
CELL_WEIGHT = 16  # observations past which a cell weighs no more
PRIOR_TOKENS = 256.0  # until it is known: so many more tokens double a step's time
PRIOR_WEIGHT = 0.0002
BEND_WEIGHT = 0.02  # a line is preferred where both fit
OFF_BY, PATIENCE = 0.20, 32  # start anew when residuals stay past 20 % for so many steps
FEATURES = 4 + len(KNOTS)
_DIAGONAL = np.arange(FEATURES)


def nnls(gram: Floats, target: Floats, start: NDArray[np.bool_] | None = None) -> Floats:
    """argmin over x >= 0 of x'Gx / 2 - t'x, by Lawson and Hanson's active sets. gram: [F, F] positive definite;
    target: [F]. start: the coefficients thought to be positive."""
    size = len(target)
    passive = np.zeros(size, bool) if start is None else start.copy()
    x = np.zeros(size)
    tolerance = 1e-10 * max(1.0, float(np.abs(target).max(initial=0.0)))
    if passive.any():
        x[passive] = np.linalg.solve(gram[np.ix_(passive, passive)], target[passive])
        if (x < 0).any():  # a guess that no longer holds
            passive[:], x[:] = False, 0.0
    for _ in range(3 * size):
        gradient = target - gram @ x
        gradient[passive] = -np.inf
        best = int(gradient.argmax())
        if gradient[best] <= tolerance:
            break
        passive[best] = True
        while True:
            trial = np.zeros(size)
            trial[passive] = np.linalg.solve(gram[np.ix_(passive, passive)], target[passive])
            if (trial[passive] > 0).all():
                x = trial
                break
            negative = passive & (trial <= 0)
            ratios = x[negative] / np.maximum(x[negative] - trial[negative], 1e-300)
            x = x + float(ratios.min()) * (trial - x)
            passive &= x > 1e-14
            x[~passive] = 0.0
            if not passive.any():
                break
    return x


class LearnedStepCost:
    """shapes: ascending batch sizes that a device pads N to (captured graphs); () if it pads nothing."""

    def __init__(self, shapes: Sequence[int] = ()) -> None:
        self.shapes = np.array(sorted(shapes), np.int64)
        self._c = [0.0] * FEATURES
        self._bends: list[tuple[float, float]] = []  # knots at which the slope rises, and by how much
        self._cells: dict[tuple[int, int, int], _Cell] = {}
        self._steps = self._bad = 0
        self.resets = 0
        self.largest = 0  # tokens of the largest step seen

    @property
    def known(self) -> bool:
        """Has any step been seen?"""
        return self._steps > 0

    def padded(self, num_tokens: Floats | Ints) -> Floats:
        """[...] what the device computes for N tokens; past the largest shape, N itself."""
        n = np.asarray(num_tokens, float)
        if not len(self.shapes):
            return n
        at = np.searchsorted(self.shapes, n)
        return np.where(at < len(self.shapes), self.shapes[np.minimum(at, len(self.shapes) - 1)], n)

    def seconds(self, num_tokens: int, kv_tokens: int, depth: int = 0) -> float:
        """Of one step."""
        n = float(self.padded(np.array([num_tokens]))[0]) if len(self.shapes) else float(num_tokens)
        out = self._c[0] + self._c[1] * n + self._c[2] * kv_tokens + self._c[3] * depth
        for knot, slope in self._bends:
            if n > knot:
                out += slope * (n - knot)
        return out

    def curve(self, num_tokens: Ints | Floats, kv_tokens: int, depth: int = 0) -> Floats:
        """[M] seconds of steps that differ in their number of tokens [M]."""
        c, n = self._c, self.padded(num_tokens)
        out = c[0] + c[2] * kv_tokens + c[3] * depth + c[1] * n
        for knot, slope in self._bends:
            out += slope * np.maximum(0.0, n - knot)
        return out

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Fixed, per token, per context token, per draft depth, and the bends at KNOTS; seconds."""
        return tuple(self._c)

    @property
    def per_depth(self) -> float:
        """Seconds of one draft depth for the whole batch."""
        return self._c[3]

    def record(self, num_tokens: int, kv_tokens: int, depth: int, seconds: float) -> None:
        """A step has been measured."""
        if not (seconds > 0 and math.isfinite(seconds)):
            return  # nothing ran
        n = float(self.padded(np.array([num_tokens]))[0]) if len(self.shapes) else float(num_tokens)
        if self._steps:
            off = abs(self.seconds(num_tokens, kv_tokens, depth) / seconds - 1.0) > OFF_BY
            self._bad = self._bad + 1 if off else 0
            if self._bad > PATIENCE:
                self._cells.clear()
                self._bad, self.resets = 0, self.resets + 1
        self.largest = max(self.largest, num_tokens)
        key = (int(4 * math.log2(max(n, 1.0))), int(kv_tokens).bit_length(), depth)
        cell = self._cells.get(key)
        if cell is None:
            self._cells[key] = _Cell(n, kv_tokens, depth, seconds)
        else:
            cell.add(n, kv_tokens, seconds)
        self._steps += 1
        if self._steps % REFIT == 0 or cell is None:
            self._fit()

    def _fit(self) -> None:
        cells = self._cells.values()
        data = np.array([(c.tokens, c.kv, c.depth, c.seconds, min(c.count, CELL_WEIGHT)) for c in cells])
        n, seconds = data[:, 0], data[:, 3]
        features = np.empty((len(data), FEATURES))
        features[:, 0] = 1.0
        features[:, 1:4] = data[:, :3]
        features[:, 4:] = np.maximum(0.0, n[:, None] - KNOTS)
        scale = features.max(axis=0)
        scale[scale == 0] = 1.0
        scale[4:] = scale[1]  # a bend just below the largest step must not become steep for being short
        weight = np.sqrt(data[:, 4]) / seconds  # relative errors
        rows = features / scale * weight[:, None]
        gram = rows.T @ rows
        target = rows.T @ (seconds * weight)
        # What the steps do not tell apart: a token costs what the prior says, context and bends cost nothing.
        usual = float(seconds @ data[:, 4] / data[:, 4].sum())
        lift = PRIOR_WEIGHT / usual**2
        gram[_DIAGONAL[1:4], _DIAGONAL[1:4]] += lift
        gram[_DIAGONAL[4:], _DIAGONAL[4:]] += lift * BEND_WEIGHT / PRIOR_WEIGHT
        target[1] += lift * usual / PRIOR_TOKENS * scale[1]
        gram[_DIAGONAL, _DIAGONAL] += 1e-9 * max(float(gram.max()), 1e-300)
        self._c = (nnls(gram, target, np.array(self._c) > 0) / scale).tolist()
        self._bends = [(k, c) for k, c in zip(KNOTS.tolist(), self._c[4:], strict=True) if c > 0]

    def state_dict(self) -> dict[str, Any]:
        cells = [[*key, c.tokens, c.kv, c.seconds, c.count] for key, c in self._cells.items()]
        return {"cells": cells, "steps": self._steps, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError if a cell cannot be read."""
        self._cells = {}
        for row in state["cells"]:
            if len(row) != 7 or not row[5] > 0:
                raise UsageError("A saved step cost has a bad cell.", "Delete the file; it is learned anew.")
            a, b, depth, tokens, kv, seconds, count = row
            cell = self._cells[int(a), int(b), int(depth)] = _Cell(tokens, kv, int(depth), seconds)
            cell.count = int(count)
        self._steps, self.largest = int(state["steps"]), int(state["largest"])
        if self._cells:
            self._fit()


class _Cell:
    """Means of like steps."""

    __slots__ = ("count", "depth", "kv", "seconds", "tokens")

    def __init__(self, tokens: float, kv: float, depth: int, seconds: float) -> None:
        self.tokens, self.kv, self.depth, self.seconds = tokens, float(kv), depth, seconds
        self.count = 1

    def add(self, tokens: float, kv: float, seconds: float) -> None:
        self.count = min(self.count + 1, CELL_MEMORY)
        rate = 1.0 / self.count
        clipped = min(max(seconds, self.seconds / CLIP), self.seconds * CLIP)
        self.tokens += rate * (tokens - self.tokens)
        self.kv += rate * (kv - self.kv)
        self.seconds += rate * (clipped - self.seconds)
