"""The seed: A Fast Post-Training Pruning Framework for Transformers (arXiv 2204.09656), as its authors released it.

Mask search by the diagonal Fisher information (section 4.1), rearrangement by its block diagonal (4.2), mask tuning
by least squares (4.3). Faithful, with its weak spots, so that anyone can compare; what it does to grouped query
heads, which it does not know, is to treat a KV group as one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import lsmr
from torch import Tensor

from llmtool.errors import InfeasibleError
from llmtool.prune.layerwise import Moments

Floats = NDArray[Any]
ACCEPT = 10.0  # a tuned mask outside of +- this is not taken, and tuning ends


def fisher_of_batches(gradients: Tensor, batch_size: int) -> Tensor:
    """[units]: the sum over mini-batches of the squared gradient of their mean loss; gradients [samples, units]
    in the order in which batches were drawn."""
    means = [part.mean(0) for part in gradients.split(batch_size)]
    return torch.stack(means).square().sum(0)


def search_macs(
    head_fisher: Floats, neuron_fisher: Floats, head_cost: float, neuron_cost: float, budget: float
) -> tuple[Floats, Floats]:
    """Masks of heads [L, H] and neurons [L, F] that keep the most Fisher information within `budget` MACs.

    Section 4.1: for every number of heads from one, the best neurons that fill the rest. The released code goes on
    where heads alone exceed the budget; here it ends. Raises InfeasibleError where not one head fits.
    """
    heads, neurons = np.sort(head_fisher, axis=None)[::-1], np.sort(neuron_fisher, axis=None)[::-1]
    kept_heads, kept_neurons = (
        np.concatenate(([0.0], np.cumsum(heads))),
        np.concatenate(([0.0], np.cumsum(neurons))),
    )
    best, choice = -1.0, (0, 0)
    for h in range(1, len(heads) + 1):
        left = budget - h * head_cost
        if left < 0:
            break
        n = min(len(neurons), int(left // neuron_cost))
        if kept_heads[h] + kept_neurons[n] > best:
            best, choice = kept_heads[h] + kept_neurons[n], (h, n)
    if best < 0:
        raise InfeasibleError("The paper's search finds no masks within the budget: not one head fits.")
    return _top(head_fisher, choice[0]), _top(neuron_fisher, choice[1])


def search_latency(
    head_fisher: Floats,
    neuron_fisher: Floats,
    head_line: Line,
    neuron_line: Line,
    budget: float,
) -> tuple[Floats, Floats]:
    """Masks that keep the most Fisher information within `budget` seconds (section 4.1, latency).

    Every layer keeps its best units up to the line's threshold, whose time is the line's floor; all others compete,
    each for the line's slope. Raises InfeasibleError where the floors alone exceed the budget.
    """
    floors = len(head_fisher) * (head_line.floor + neuron_line.floor)
    left = budget - floors
    if left < 0:
        raise InfeasibleError(
            f"The paper's search needs {floors:.3g} s for at least one unit "
            f"in every sublayer, and the budget is {budget:.3g} s."
        )
    base_heads, rest_heads = _split(head_fisher, head_line.threshold)
    base_neurons, rest_neurons = _split(neuron_fisher, neuron_line.threshold)
    gains_h = np.concatenate(([0.0], np.cumsum([f for f, _, _ in rest_heads])))
    gains_n = np.concatenate(([0.0], np.cumsum([f for f, _, _ in rest_neurons])))
    best, choice = -1.0, (0, 0)
    for h in range(len(rest_heads) + 1):
        remaining = left - h * head_line.slope
        if remaining < 0:
            break
        n = len(rest_neurons)
        if neuron_line.slope > 0:
            n = min(n, int(remaining / neuron_line.slope))
        if gains_h[h] + gains_n[n] > best:
            best, choice = gains_h[h] + gains_n[n], (h, n)
    return (
        _mask([*base_heads, *rest_heads[: choice[0]]], head_fisher.shape),
        _mask([*base_neurons, *rest_neurons[: choice[1]]], neuron_fisher.shape),
    )


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a layer's sublayer: `floor` up to `threshold` units, `slope` more for every further unit."""

    floor: float
    threshold: int
    slope: float

    def seconds(self, units: int) -> float:
        return self.floor + self.slope * max(0, units - self.threshold)


def fit_line(table: Sequence[float]) -> Line:
    """The line with the least squared error to seconds of 1, 2, ... units, for every place of the bend."""
    seconds = np.asarray(table, dtype=float)
    best: tuple[float, Line] | None = None
    for threshold in range(1, len(seconds) + 1):
        floor = float(seconds[:threshold].mean())
        x, y = np.arange(1, len(seconds) - threshold + 1), seconds[threshold:] - floor
        slope = max(0.0, float((x * y).sum() / (x * x).sum())) if len(x) else 0.0
        error = float(((seconds[:threshold] - floor) ** 2).sum() + ((y - slope * x) ** 2).sum())
        if best is None or error < best[0]:
            best = error, Line(floor, threshold, slope)
    assert best is not None
    return best[1]


def rearrange(gradients: Tensor, mask: Tensor) -> Tensor:
    """bool [units]: as many as in `mask`, chosen by the block-diagonal Fisher information (section 4.2).

    gradients [batches, units]: of mini-batches' mean losses. One greedy pass: from the units of least Fisher
    information as the pruned set, every other unit in turn is added, and the one is let go without which the
    squared norm of the set's summed gradients is least.
    """
    pruned = int((~mask).sum())
    if pruned in (0, len(mask)):
        return mask.clone()
    vectors = gradients.T.double()  # [units, batches]
    order = vectors.square().sum(1).argsort(stable=True).tolist()
    inside = order[:pruned]
    total = vectors[inside].sum(0)
    for unit in order[pruned:]:
        inside.append(unit)
        total = total + vectors[unit]
        without = (total - vectors[inside]).square().sum(1)
        let_go = inside.pop(int(without.argmin()))
        total = total - vectors[let_go]
    kept = torch.ones(len(mask), dtype=torch.bool)
    kept[inside] = False
    return kept


def head_system(moments: Moments, weight: Tensor, bias: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Normal equations of the heads' scales and an intercept (section 4.3): [heads + 1] square, and right side.

    One equation per token and output; moments of the kept heads' columns, weight [out, heads * dim].
    """
    w, xx = weight.double(), moments.xx.double()
    heads = weight.shape[1] // dim
    outputs = weight.shape[0]
    normal = torch.zeros(heads + 1, heads + 1, dtype=torch.float64)
    normal[:-1, :-1] = ((w.T @ w) * xx).unflatten(0, (heads, dim)).unflatten(2, (heads, dim)).sum((1, 3))
    sums = (moments.x.double() * w.sum(0)).unflatten(0, (heads, dim)).sum(1)
    normal[-1, :-1] = normal[:-1, -1] = sums
    normal[-1, -1] = moments.weight * outputs
    right = torch.zeros(heads + 1, dtype=torch.float64)
    right[:-1] = (_right(moments, w, bias)).unflatten(0, (heads, dim)).sum(1)
    shift = 0.0 if bias is None else float(bias.double().sum()) * moments.weight
    right[-1] = float(moments.y.double().sum()) - shift
    return normal, right


def neuron_system(moments: Moments, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of neurons, without an intercept, as released."""
    w = weight.double()
    return (w.T @ w) * moments.xx.double(), _right(moments, w, bias)


def solve_scales(normal: Tensor, right: Tensor, count: int) -> Tensor | None:
    """Scales [count], or None where the solver gives up or a scale leaves +-10: tuning then ends for good.

    As released: LSMR in fp32, damping 1, on the normal equations, for the scales' distance from 1.
    """
    matrix, vector = normal.float().numpy(), (right - normal.sum(1)).float().numpy()
    if len(vector) == 1:
        change = vector / matrix[0]
        stopped = 1
    else:
        with np.errstate(over="ignore"):  # its own 1e100 does not fit in fp32
            change, stopped, *_ = lsmr(matrix, vector, damp=1.0)
    scales = 1.0 + torch.from_numpy(np.asarray(change))[:count]
    if stopped >= 3 or not bool(scales.isfinite().all()) or float(scales.abs().max()) > ACCEPT:
        return None
    return scales


def _right(moments: Moments, weight: Tensor, bias: Tensor | None) -> Tensor:
    xy = moments.xy.double()
    if bias is not None:
        xy = xy - torch.outer(moments.x.double(), bias.double())
    return (xy * weight.T).sum(1)


Unit = tuple[float, int, int]  # Fisher information, layer, unit


def _split(fisher: Floats, threshold: int) -> tuple[list[Unit], list[Unit]]:
    """Each layer's best `threshold` units, and all others, the best first."""
    base: list[Unit] = []
    rest: list[Unit] = []
    for layer, row in enumerate(fisher):
        order = np.argsort(-row, kind="stable").tolist()
        base += [(float(row[u]), layer, u) for u in order[:threshold]]
        rest += [(float(row[u]), layer, u) for u in order[threshold:]]
    return base, sorted(rest, key=lambda unit: (-unit[0], unit[1], unit[2]))


def _top(fisher: Floats, count: int) -> Floats:
    mask = np.zeros(fisher.size, dtype=bool)
    mask[np.argsort(-fisher, axis=None, kind="stable")[:count]] = True
    return mask.reshape(fisher.shape)


def _mask(units: Sequence[Unit], shape: tuple[int, ...]) -> Floats:
    mask = np.zeros(shape, dtype=bool)
    for _, layer, unit in units:
        mask[layer, unit] = True
    return mask
