"""What a sublayer loses at every size, and which units stay at it, by the optimal brain surgeon.

With H the Gram matrix of the consumer's inputs and W its weight, taking away columns S and refitting the others by
least squares costs tr(G W_S (H^-1_SS)^-1 W_S^T) (Hassibi and Stork, 1992; for structures ZipLM, arXiv 2302.04089,
section 3), where G is the covariance of the loss's gradient by the output: the loss to second order, with inputs
and gradients taken as independent. Units go one by one, or in small blocks, the least costly first, and H^-1 is
downdated each time. So units that others can stand in for go early, which no score of a single unit can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtool.prune.units import Sublayer

DAMPING = 1e-3  # of H, in units of its mean diagonal
BLOCKS = 96  # an MLP's neurons go in about so many blocks


@dataclass(frozen=True, slots=True)
class Option:
    """One size of a sublayer: the units that stay, and what it costs the loss."""

    units: tuple[int, ...]
    error: float


def curve(
    sublayer: Sublayer,
    gram: Tensor,
    weight: Tensor,
    importance: Tensor | None,
    kept: Sequence[int],
    granularity: int,
) -> list[Option]:
    """Options from all of `kept` down to sublayer.min_units, their errors rising.

    gram [in, in], weight [out, in]: of the whole sublayer, of which the columns of `kept` count. importance [out,
    out]: G, None for the identity. granularity: neurons are taken in multiples of it, so that what is left is one.
    """
    columns = _columns(sublayer, kept)
    matrix, w = gram[columns][:, columns].double(), weight[:, columns].double()
    if importance is not None:
        w = _root(importance.double()) @ w
    matrix.diagonal().add_(DAMPING * float(matrix.diagonal().mean()) + 1e-12)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # fp32 sums of inputs that differ too much in size need not be positive definite.
    inverse = torch.linalg.inv(matrix) if int(failed) else torch.cholesky_inverse(factor)
    state = _State(inverse, w, list(kept), sublayer.unit_dim)
    if sublayer.kind == "mlp":
        return _neurons(state, sublayer, granularity)
    if sublayer.group == 1:
        return _heads(state, sublayer)
    return _grouped_heads(state, sublayer)


@dataclass(slots=True)
class _State:
    """H^-1 and G^(1/2) W of `units`. Rows and columns of the dead ones are zero; now and then they are cut out."""

    inverse: Tensor
    weight: Tensor
    units: list[int]
    dim: int
    error: float = 0.0
    dead: set[int] = field(default_factory=set)

    def copy(self) -> _State:
        return _State(
            self.inverse.clone(), self.weight.clone(), list(self.units), self.dim, self.error, set(self.dead)
        )

    @property
    def count(self) -> int:
        return len(self.units) - len(self.dead)

    @property
    def places(self) -> list[int]:
        """Of the units that are left."""
        return [i for i in range(len(self.units)) if i not in self.dead]

    def cost(self, places: Sequence[int]) -> float:
        """Of removing the units at these places together."""
        at = self._at(places)
        block = self.weight[:, at]
        return float((block.T * torch.linalg.solve(self.inverse[at][:, at], block.T)).sum())

    def unit_costs(self) -> Tensor:
        """[places]: of removing each alone; infinite for the dead."""
        costs = torch.full((len(self.units),), torch.inf, dtype=torch.float64)
        left = torch.tensor(self.places)
        if self.dim == 1:
            alone = self.weight.square().sum(0) / self.inverse.diagonal()
            costs[left] = alone[left].cpu()
        else:
            costs[left] = torch.tensor([self.cost([i]) for i in left.tolist()], dtype=torch.float64)
        return costs

    def remove(self, places: Sequence[int]) -> None:
        at = self._at(places)
        inside, side, block = self.inverse[at][:, at], self.inverse[at], self.weight[:, at]
        step = torch.linalg.solve(inside, side)  # [S, all]
        self.error += float((block.T * torch.linalg.solve(inside, block.T)).sum())
        self.inverse.addmm_(side.T, step, alpha=-1)
        self.weight.addmm_(block, step, alpha=-1)
        self.dead |= set(places)
        if len(self.dead) * 8 > len(self.units):
            self._cut()

    def option(self) -> Option:
        return Option(tuple(self.units[i] for i in self.places), max(0.0, self.error))

    def _cut(self) -> None:
        left = self.places
        at = self._at(left)
        self.inverse, self.weight = self.inverse[at][:, at], self.weight[:, at]
        self.units, self.dead = [self.units[i] for i in left], set()

    def _at(self, places: Sequence[int]) -> Tensor:
        at = torch.tensor(list(places), dtype=torch.int64, device=self.inverse.device)
        if self.dim == 1:
            return at
        return (at[:, None] * self.dim + torch.arange(self.dim, device=at.device)).flatten()


def _neurons(state: _State, sublayer: Sublayer, granularity: int) -> list[Option]:
    options, step = [state.option()], max(granularity, -(-state.count // BLOCKS))
    step = -(-step // granularity) * granularity
    while state.count > sublayer.min_units:
        count = state.count % step or step  # the first step ends on a multiple
        costs = state.unit_costs()
        state.remove(costs.argsort(stable=True)[:count].sort().values.tolist())
        options.append(state.option())
    return options


def _heads(state: _State, sublayer: Sublayer) -> list[Option]:
    options = [state.option()]
    while state.count > sublayer.min_units:
        state.remove([int(state.unit_costs().argmin())])
        options.append(state.option())
    return options


def _grouped_heads(state: _State, sublayer: Sublayer) -> list[Option]:
    """Every number of KV heads with every number of query heads for each of them.

    A step takes one query head of every group, or a whole group; both keep the groups alike.
    """
    options: list[Option] = []
    while True:
        rest = state.copy()
        options.append(rest.option())
        while len(groups := _groups(rest, sublayer)) > min(1, sublayer.min_units):
            rest.remove(min(groups.values(), key=rest.cost))
            options.append(rest.option())
        members = _groups(state, sublayer)
        if not members or len(next(iter(members.values()))) == 1:
            return options
        for group in list(members):
            places = _groups(state, sublayer)[group]
            state.remove([min(places, key=lambda place: state.cost([place]))])


def _groups(state: _State, sublayer: Sublayer) -> dict[int, list[int]]:
    """KV head -> places of its query heads among the units that are left."""
    found: dict[int, list[int]] = {}
    for place in state.places:
        found.setdefault(state.units[place] // sublayer.group, []).append(place)
    return found


def _columns(sublayer: Sublayer, units: Sequence[int]) -> Tensor:
    at = torch.tensor(list(units), dtype=torch.int64)
    return (at[:, None] * sublayer.unit_dim + torch.arange(sublayer.unit_dim)).flatten()


def _root(matrix: Tensor) -> Tensor:
    """A square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T
