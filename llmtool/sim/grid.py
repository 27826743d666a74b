"""Grid: measured times as ratios over a roofline, on logarithmic axes; and the file that holds many of them.

A ratio varies far less than a time, so few points carry a whole kernel table, and outside them the roofline goes
on.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from llmtool.errors import UsageError

VERSION = 1
_SMOOTH = 0.02  # weight of differences between neighbours, where no point says better


@dataclass(frozen=True, slots=True)
class Grid:
    """axes: ascending positive coordinates. values: log of measured / roofline, one dimension per axis."""

    axes: tuple[tuple[float, ...], ...]
    logs: tuple[tuple[float, ...], ...]
    values: NDArray[np.float32]

    def ratio(self, *at: float) -> float:
        """Measured over roofline at a point: multilinear in the logarithms, constant beyond the edges."""
        corners: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for log_axis, axis, x in zip(self.logs, self.axes, at, strict=True):
            low = min(max(bisect_right(axis, x) - 1, 0), len(axis) - 1)
            high = min(low + 1, len(axis) - 1)
            span = log_axis[high] - log_axis[low]
            part = min(1.0, max(0.0, (math.log(max(x, 1e-30)) - log_axis[low]) / span)) if span else 0.0
            if part == 0.0 or high == low:
                corners = [((*index, low), weight) for index, weight in corners]
            else:
                corners = [
                    ((*index, end), weight * share)
                    for index, weight in corners
                    for end, share in ((low, 1 - part), (high, part))
                ]
        return math.exp(sum(weight * float(self.values[index]) for index, weight in corners))


def grid(axes: Sequence[Sequence[float]], values: NDArray[Any]) -> Grid:
    fixed = tuple(tuple(float(x) for x in axis) for axis in axes)
    logs = tuple(tuple(math.log(x) for x in axis) for axis in fixed)
    return Grid(fixed, logs, np.asarray(values, dtype=np.float32))


def fit_grid(axes: Sequence[Sequence[float]], points: NDArray[Any], log_ratios: NDArray[Any]) -> Grid:
    """The grid that is closest to scattered points, in least squares, and smooth where there are none.

    points: [n, axes] coordinates. log_ratios: [n].
    """
    from scipy.sparse import coo_matrix, vstack
    from scipy.sparse.linalg import lsqr

    shape = tuple(len(axis) for axis in axes)
    n = len(points)
    index, weight = np.zeros((n, 1), dtype=np.int64), np.ones((n, 1))
    for axis, size, column in zip(axes, shape, points.T, strict=True):
        logs = np.log(np.asarray(axis, dtype=np.float64))
        x = np.clip(np.log(np.maximum(column, 1e-30)), logs[0], logs[-1])
        low = np.clip(np.searchsorted(logs, x, side="right") - 1, 0, max(0, size - 2))
        if size == 1:
            index = index * size
            continue
        part = (x - logs[low]) / (logs[low + 1] - logs[low])
        index = np.concatenate([index * size + low[:, None], index * size + low[:, None] + 1], axis=1)
        weight = np.concatenate([weight * (1 - part)[:, None], weight * part[:, None]], axis=1)
    rows = np.repeat(np.arange(n), index.shape[1])
    cells = int(np.prod(shape))
    data = coo_matrix((weight.ravel(), (rows, index.ravel())), shape=(n, cells))
    scale = math.sqrt(n / cells) * _SMOOTH
    ids = np.arange(cells).reshape(shape)
    smooth = []
    for dim, size in enumerate(shape):
        if size > 1:
            a = np.take(ids, range(size - 1), axis=dim).ravel()
            b = np.take(ids, range(1, size), axis=dim).ravel()
            rows = np.arange(len(a))
            ones = np.full(len(a), scale)
            smooth.append(
                coo_matrix(
                    (np.concatenate([ones, -ones]), (np.concatenate([rows, rows]), np.concatenate([a, b]))),
                    shape=(len(a), cells),
                )
            )
    matrix = vstack([data, *smooth]).tocsr()
    target = np.concatenate([log_ratios, np.zeros(matrix.shape[0] - n)])
    start = np.full(cells, float(np.mean(log_ratios)))
    solution = lsqr(matrix, target, x0=start, atol=1e-6, btol=1e-6, iter_lim=2000)[0]
    return grid(axes, solution.reshape(shape))


@dataclass(frozen=True, slots=True)
class Tables:
    """Grids by operation, such as gemm/bf16. source: engine, version and where the measurements are from."""

    grids: Mapping[str, Grid]
    device: str
    source: str

    def save(self, path: str | Path) -> None:
        arrays: dict[str, Any] = {}
        for name, g in self.grids.items():
            arrays[name] = g.values.astype(np.float16)
            for i, axis in enumerate(g.axes):
                arrays[f"{name}@{i}"] = np.asarray(axis, dtype=np.float64)
        head = json.dumps({"version": VERSION, "device": self.device, "source": self.source})
        np.savez_compressed(path, header=np.array(head), **arrays)

    @classmethod
    def load(cls, path: Any) -> Tables:
        """Raises UsageError for a file that is none."""
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(str(file["header"]))
                if head["version"] != VERSION:
                    raise UsageError(
                        f"{path} has version {head['version']}; this llmtool reads {VERSION}.",
                        "Import the tables again.",
                    )
                grids = {}
                for name in file.files:
                    if name != "header" and "@" not in name:
                        values = file[name].astype(np.float32)
                        grids[name] = grid([file[f"{name}@{i}"] for i in range(values.ndim)], values)
                return cls(grids, head["device"], head["source"])
        except (OSError, EOFError, KeyError, ValueError, TypeError, BadZipFile) as e:
            raise UsageError(f"{path} is no file of kernel tables: {e}.") from None
