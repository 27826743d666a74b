"""Compensation in closed form: a consumer's kept columns, refitted so that its sublayer gives what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtool.prune.layerwise import Moments

RIDGES = (1e-3, 1e-2, 0.05, 0.2, 0.8)  # in units of the inputs' mean square


@dataclass(frozen=True, slots=True)
class Fit:
    """weight [out, kept], bias [out] or None. how: "ridge" | "scales" | "none". error, before: mean squared error
    on held-out tokens with and without the fit."""

    weight: Tensor
    bias: Tensor | None
    how: str
    error: float
    before: float
    ridge: float = 0.0


def refit(
    fit: Moments, held_out: Moments, weight: Tensor, bias: Tensor | None, ridges: Sequence[float] = RIDGES
) -> Fit:
    """The best of: ridge towards `weight`, one scale per column, nothing; whichever errs least on held-out tokens.

    fit, held_out: of the kept columns. weight [out, kept], bias [out]: as they are. The ridge's strength is chosen
    on held-out tokens, from the strongest down while they gain by it, then all tokens are fitted with it.
    """
    before = held_out.error(weight, bias)
    best = Fit(weight, bias, "none", before, before)
    if not weight.shape[1]:
        return best
    system, last = _System.of(fit, weight, bias), float("inf")
    for strength in sorted(ridges, reverse=True):
        try:
            candidate = system.solve(strength)
        except torch.linalg.LinAlgError:  # a ridge too weak for columns that say the same
            break
        error = held_out.error(*candidate)
        if error < best.error:
            best = Fit(*candidate, "ridge", error, before, strength)
        if error >= last:
            break
        last = error
    if best.how == "ridge":
        try:
            solution = ridge(fit.merged(held_out), weight, bias, best.ridge)
            return Fit(*solution, "ridge", best.error, before, best.ridge)
        except torch.linalg.LinAlgError:
            return best  # the fit that was checked will do
    scaled = _scales(fit, weight, bias)
    if scaled is not None and (error := held_out.error(scaled, bias)) < best.error:
        return Fit(scaled, bias, "scales", error, before)
    return best


def ridge(
    moments: Moments, weight: Tensor, bias: Tensor | None, strength: float
) -> tuple[Tensor, Tensor | None]:
    """argmin of the mean of ||y - W x - b||^2 + strength * mean(x^2) * ||W - weight||^2; b only where there is one.

    fp64 Cholesky. Raises LinAlgError where the matrix is not positive definite.
    """
    return _System.of(moments, weight, bias).solve(strength)


@dataclass(slots=True)
class _System:
    """What ridges of all strengths share: sums in fp64, centred where there is a bias, and what `old` leaves."""

    xx: Tensor
    left: Tensor  # of xy: [in, out]
    old: Tensor  # [in, out]
    x: Tensor
    y: Tensor
    count: float
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, moments: Moments, weight: Tensor, bias: Tensor | None) -> _System:
        xx, xy = moments.xx.double(), moments.xy.double()
        x, y, count = moments.x.double(), moments.y.double(), moments.weight
        if bias is not None:  # centred, the bias falls out
            xx = xx - torch.outer(x, x) / count
            xy = xy - torch.outer(x, y) / count
        old = weight.T.double()
        return cls(xx, xy - xx @ old, old, x, y, count, weight, bias)

    def solve(self, strength: float) -> tuple[Tensor, Tensor | None]:
        diagonal = self.xx.diagonal()
        matrix = self.xx.clone()
        matrix.diagonal().add_(strength * float(diagonal.mean()) + 1e-12 * float(diagonal.max()))
        new = self.old + torch.cholesky_solve(self.left, torch.linalg.cholesky(matrix))
        shift = None if self.bias is None else ((self.y - self.x @ new) / self.count).to(self.bias.dtype)
        return new.T.to(self.weight.dtype).contiguous(), shift


def _scales(moments: Moments, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """weight with its columns scaled by least squares, within +-10 as arXiv 2204.09656 has it; None otherwise."""
    w = weight.double()
    normal = (w.T @ w) * moments.xx.double()
    xy = moments.xy.double()
    if bias is not None:
        xy = xy - torch.outer(moments.x.double(), bias.double())
    right = (xy * w.T).sum(1) - normal.sum(1)
    normal.diagonal().add_(1e-3 * float(normal.diagonal().mean()) + 1e-30)
    factor, info = torch.linalg.cholesky_ex(normal)
    if int(info):
        return None
    scales = 1.0 + torch.cholesky_solve(right[:, None], factor).squeeze(1)
    if float(scales.abs().max()) > 10:
        return None
    return (w * scales).to(weight.dtype)
