"""Our method: sizes by a knapsack over curves of compensated loss, then least squares from the bottom up.

1. Calibrate on the dense model: which tokens and outputs the loss depends on (gradients), and what the consumers
   read (Gram matrices). 2. Curves: what every size of every sublayer costs (curves.py). 3. Allocate sizes within
   the budgets (knapsack.py); how much attention's curves weigh against the MLPs' is chosen by the answers'
   divergence on held-out samples. 4. Refit the consumers one after the other (layerwise.py, least_squares.py).
   For small budgets this goes in rounds, the later ones from curves of the pruned model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.prune.batches import Batch, batches
from llmtool.prune.budget import Budget
from llmtool.prune.calibrate import Gradients, gradients, token_weights
from llmtool.prune.cost import CostModel, size
from llmtool.prune.curves import Option, curve
from llmtool.prune.knapsack import Choice, allocate
from llmtool.prune.layerwise import Moments, side_by_side
from llmtool.prune.least_squares import Fit, refit
from llmtool.prune.model import Loaded
from llmtool.prune.objective import Objective, divergence
from llmtool.prune.units import Kept, Sublayer, all_units, columns, consumer_of

BATCH, BATCH_LM = 16, 4  # a decoder has a vocabulary of logits per token, kept for the backward pass
HELD_OUT = 5  # every fifth batch chooses ridges and exchange rates, and is then fitted too
EXCHANGE = (1.0, 0.5, 2.0, 0.25, 4.0)
ROUNDS = ((0.3, 2),)  # budgets below a share take so many rounds; at 0.4 a second one changed nothing
Progress = Callable[[str, float], None]


@dataclass(slots=True)
class Settings:
    """granularity: neurons come in multiples of it. uniform: the same sizes in every layer. rounds: None picks them
    by the budget. exchange: tried weights of attention's curves."""

    granularity: int = 1
    uniform: bool = False
    rounds: int | None = None
    exchange: Sequence[float] = EXCHANGE


@dataclass(slots=True)
class Result:
    """model: of the dense shapes, pruned columns zero, the others refitted. kept: the units that stay. fits: how
    each sublayer was compensated. notes: facts for the report."""

    model: Any
    kept: Kept
    fits: dict[str, Fit] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Obs:
    """One calibration of the dense model, and any number of budgets."""

    def __init__(
        self,
        loaded: Loaded,
        items: Sequence[Any],
        objective: Objective,
        seed: int,
        settings: Settings,
        progress: Progress = lambda what, fraction: None,
    ) -> None:
        self.loaded, self.objective, self.seed, self.settings = loaded, objective, seed, settings
        self.progress = progress
        self.batches = batches(items, BATCH_LM if loaded.causal else BATCH, loaded.pad_id)
        self.held_out = list(range(HELD_OUT - 1, len(self.batches), HELD_OUT)) or [len(self.batches) - 1]
        self.dense = self._calibrate(loaded.model, "Calibrating")
        self.answers = self._dense_answers()
        self.curves = self._curves(loaded.model, self.dense, all_units(loaded.sublayers))

    def prune(self, budget: Budget, costs: CostModel) -> Result:
        """Raises InfeasibleError."""
        loaded, settings = self.loaded, self.settings
        student = copy.deepcopy(loaded.model)
        kept = all_units(loaded.sublayers)
        if budget.is_dense:
            return Result(student, kept)
        budget.absolute(costs, loaded.sublayers)  # an infeasible one ends here, before the long part
        least = min(budget.shares.values())
        rounds = settings.rounds or next((n for share, n in ROUNDS if least < share), 1)
        calibration, curves = self.dense, self.curves
        fits: dict[str, Fit] = {}
        rates: list[float] = []
        for turn in range(1, rounds + 1):
            limits = budget.eased(turn / rounds).absolute(costs, loaded.sublayers)
            if turn > 1:
                calibration = self._calibrate(student, f"Calibrating, round {turn}")
                curves = self._curves(student, calibration, kept)
            kept, rate = self._allocate(student, calibration, curves, limits, costs)
            rates.append(rate)
            fits = self._compensate(student, kept)
        return Result(student, kept, fits, {"exchange_rates": rates, "rounds": rounds})

    def _calibrate(self, model: nn.Module, what: str) -> Gradients:
        """One forward and one backward pass over the batches."""
        return gradients(
            model, self.loaded.layout, self.loaded.sublayers, self.batches, self.objective, self.seed,
            with_moments=True, progress=partial(self.progress, what),
        )  # fmt: skip

    # -- sizes -----------------------------------------------------------------------------------------------

    def _curves(self, model: nn.Module, calibration: Gradients, kept: Kept) -> list[list[Option]]:
        found = []
        for i, s in enumerate(self.loaded.sublayers):
            weight = consumer_of(model, self.loaded.layout, s).weight
            outputs = calibration.outputs[i]
            found.append(curve(s, calibration.grams[i], weight, outputs, kept[i], self.settings.granularity))
            self.progress("Curves", (i + 1) / len(self.loaded.sublayers))
        return found

    def _allocate(
        self,
        student: nn.Module,
        calibration: Gradients,
        curves: list[list[Option]],
        limits: Mapping[str, float],
        costs: CostModel,
    ) -> tuple[Kept, float]:
        """The allocation whose answers, after a quick refit, are nearest to the dense model's on held-out
        samples."""
        tried: dict[Kept, float] = {}
        best: tuple[float, Kept, float] | None = None
        for at, rate in enumerate(self.settings.exchange):
            kept = allocation(self.loaded.sublayers, curves, limits, costs, rate, self.settings.uniform)
            if kept not in tried:
                candidate = copy.deepcopy(student)
                quick_refit(self.loaded, candidate, calibration.grams, kept)
                tried[kept] = self._divergence(candidate)
            if best is None or tried[kept] < best[0]:
                best = tried[kept], kept, rate
            self.progress("Allocating", (at + 1) / len(self.settings.exchange))
        assert best is not None
        return best[1], best[2]

    @torch.no_grad()
    def _dense_answers(self) -> dict[int, Tensor]:
        model, found = self.loaded.model, {}
        device = next(model.parameters()).device
        for at in self.held_out:
            part = self.batches[at].to(device)
            found[at] = self.objective.answers(_forward(model, part, device), part)
        return found

    @torch.no_grad()
    def _divergence(self, model: nn.Module) -> float:
        device, total = next(model.parameters()).device, 0.0
        for at, dense in self.answers.items():
            part = self.batches[at].to(device)
            other = self.objective.answers(_forward(model, part, device), part)
            total += divergence(self.objective.head, dense, other, part.inputs)
        return total

    # -- weights ---------------------------------------------------------------------------------------------

    def _compensate(self, student: nn.Module, kept: Kept) -> dict[str, Fit]:
        """Zero what is not kept, and refit the rest from the bottom up."""
        loaded = self.loaded
        erase(loaded, student, kept)
        fits: dict[str, Fit] = {}

        def solve(sublayer: Sublayer, fit: Moments, held_out: Moments) -> None:
            consumer = consumer_of(student, loaded.layout, sublayer)
            at = columns(sublayer, kept[sublayer.index]).to(consumer.weight.device)
            found = refit(fit, held_out, consumer.weight[:, at], consumer.bias)
            consumer.weight[:, at] = found.weight
            if consumer.bias is not None and found.bias is not None:
                consumer.bias.copy_(found.bias)
            fits[sublayer.name] = found

        side_by_side(
            loaded.model, student, loaded.layout, loaded.sublayers, self.batches, self.held_out, kept, solve,
            lambda b, s, batch, shape: token_weights(batch, shape),
            lambda f: self.progress("Compensating", f),
        )  # fmt: skip
        return fits


def allocation(
    sublayers: Sequence[Sublayer],
    curves: Sequence[Sequence[Option]],
    limits: Mapping[str, float],
    costs: CostModel,
    rate: float,
    uniform: bool,
) -> Kept:
    """One option per sublayer within the limits; rate: how much attention's errors weigh. Raises
    InfeasibleError."""

    def choice(s: Sublayer, option: Option) -> Choice:
        count, kv_heads = size(s, option.units)
        weight = rate if s.kind == "attention" else 1.0
        return Choice(option.error * weight, {k: costs.of(k, s, count, kv_heads) for k in limits})

    if not uniform:
        choices = [[choice(s, o) for o in options] for s, options in zip(sublayers, curves, strict=True)]
        picked = allocate(choices, limits)
        return tuple(options[j].units for options, j in zip(curves, picked, strict=True))
    kinds = ("attention", "mlp")
    grouped = {kind: [i for i, s in enumerate(sublayers) if s.kind == kind] for kind in kinds}
    joint: dict[str, list[list[Option]]] = {}
    for kind, members in grouped.items():
        by_size = [{size(sublayers[i], o.units): o for o in curves[i]} for i in members]
        shared = [key for key in by_size[0] if all(key in table for table in by_size)]
        hidden = costs.shape.hidden
        # Stock classes want the hidden size to be a multiple of the heads, and at least one unit.
        shared = [key for key in shared if key[0] and (kind == "mlp" or hidden % key[0] == 0)]
        joint[kind] = [[table[key] for table in by_size] for key in shared]
    sums = [
        [
            _sum([choice(sublayers[i], o) for i, o in zip(grouped[kind], row, strict=True)])
            for row in joint[kind]
        ]
        for kind in kinds
    ]
    picked = allocate(sums, limits)
    kept: list[tuple[int, ...]] = [()] * len(sublayers)
    for kind, j in zip(kinds, picked, strict=True):
        for i, option in zip(grouped[kind], joint[kind][j], strict=True):
            kept[i] = option.units
    return tuple(kept)


def _sum(choices: Sequence[Choice]) -> Choice:
    costs = {kind: sum(c.costs[kind] for c in choices) for kind in choices[0].costs}
    return Choice(sum(c.error for c in choices), costs)


@torch.no_grad()
def quick_refit(loaded: Loaded, model: nn.Module, grams: Sequence[Tensor], kept: Kept) -> None:
    """Least squares of each consumer on its own inputs, all at once: what curves assume."""
    for s, units, gram in zip(loaded.sublayers, kept, grams, strict=True):
        if len(units) == s.num_units:
            continue
        consumer = consumer_of(model, loaded.layout, s)
        at = columns(s, units).to(gram.device)
        new = torch.zeros_like(consumer.weight)
        if len(at):
            # Only to choose between allocations: fp32 and a strong ridge, towards what is there.
            inside = gram[at][:, at]
            inside.diagonal().add_(1e-2 * float(inside.diagonal().mean()) + 1e-9)
            rest = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
            rest[at] = False
            old = consumer.weight
            right = gram[at][:, rest] @ old[:, rest].T
            factor, failed = torch.linalg.cholesky_ex(inside)
            if int(failed):  # inputs that differ too much in size for fp32
                right, factor = right.double(), torch.linalg.cholesky(inside.double())
            new[:, at] = old[:, at] + torch.cholesky_solve(right, factor).T.to(old.dtype)
        consumer.weight.copy_(new)


@torch.no_grad()
def erase(loaded: Loaded, model: nn.Module, kept: Kept) -> None:
    """Zero the consumers' columns of units that are not kept."""
    for s, units in zip(loaded.sublayers, kept, strict=True):
        weight = consumer_of(model, loaded.layout, s).weight
        gone = sorted(set(range(s.num_units)) - set(units))
        if gone:
            weight[:, columns(s, gone).to(weight.device)] = 0.0


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    options = {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
    return model(**batch.to(device).inputs, **options)
