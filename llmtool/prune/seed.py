"""`--method paper`: the seed from calibration to tuned masks (arXiv 2204.09656), on the parts of paper.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llmtool.errors import InfeasibleError, UsageError
from llmtool.prune.batches import Batch, Item, batches
from llmtool.prune.budget import Budget
from llmtool.prune.calibrate import gradients, token_weights
from llmtool.prune.cost import CostModel
from llmtool.prune.layerwise import Enough, Moments, side_by_side
from llmtool.prune.model import Loaded
from llmtool.prune.objective import Objective
from llmtool.prune.obs import BATCH_LM, Result, erase
from llmtool.prune.paper import (
    Floats,
    fisher_of_batches,
    fit_line,
    head_system,
    neuron_system,
    rearrange,
    search_latency,
    search_macs,
    solve_scales,
)
from llmtool.prune.remove import remove
from llmtool.prune.units import Kept, Sublayer, all_units, columns, consumer_of

Progress = Callable[[str, float], None]
BATCH, BATCH_QA = 32, 12  # its mini-batches


class Paper:
    """One calibration, and any number of budgets. A KV group with its query heads counts as one head."""

    def __init__(
        self,
        loaded: Loaded,
        items: Sequence[Item],
        objective: Objective,
        seed: int,
        progress: Progress = lambda what, fraction: None,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        """masks: the loss's gradients by masks [samples, units] of each sublayer, where they are known already."""
        self.loaded, self.objective, self.progress = loaded, objective, progress
        size = BATCH_QA if loaded.head == "qa" else BATCH
        # Samples' gradients are apart: they can go by length, a decoder's in small steps, and only their means are
        # taken over the mini-batches as drawn.
        self.batches = batches(items, BATCH_LM if loaded.causal else size, loaded.pad_id)
        if masks is None:
            masks = gradients(
                loaded.model, loaded.layout, loaded.sublayers, self.batches, objective, seed,
                progress=lambda f: progress("Fisher information", f),
            ).masks  # fmt: skip
        # [samples, units] of each sublayer; a group's gradient is the sum of its heads'.
        per_sample = [
            g.unflatten(1, (s.num_groups, s.group)).sum(2)
            for g, s in zip(masks, loaded.sublayers, strict=True)
        ]
        self.means = [torch.stack([part.mean(0) for part in g.split(size)]) for g in per_sample]
        self.fisher = [fisher_of_batches(g, size).double().numpy() for g in per_sample]

    def prune(self, budget: Budget, costs: CostModel) -> Result:
        """Raises UsageError for a budget that the paper does not know, InfeasibleError for one that is too
        small."""
        loaded = self.loaded
        student = copy.deepcopy(loaded.model)
        if budget.is_dense:
            return Result(student, all_units(loaded.sublayers))
        if len(budget.shares) != 1 or "kv" in budget.shares:
            raise UsageError(
                "--method paper takes one budget: --flops, --params or --latency.",
                "Leave the others out, or use --method obs.",
            )
        budget.absolute(costs, loaded.sublayers)
        ((kind, share),) = budget.shares.items()
        teacher = remove(loaded, loaded.model, self._units(self._search(kind, share**0.5, costs)))
        masks = self._rearranged(self._search(kind, share, costs))
        kept = self._units(masks)
        erase(loaded, student, kept)
        tuned = self._tune(teacher, student, kept)
        return Result(student, kept, notes={"tuned_sublayers": tuned, "sublayers": len(loaded.sublayers)})

    def _search(self, kind: str, share: float, costs: CostModel) -> list[Tensor]:
        """bool [groups or neurons] of each sublayer within share of the dense cost."""
        subs = self.loaded.sublayers
        heads, neurons = np.stack(self.fisher[0::2]), np.stack(self.fisher[1::2])
        dense = costs.dense(kind, subs)
        if kind == "latency":
            table = costs.latency
            assert table is not None
            head_line = fit_line(
                [table.seconds("attention", n * subs[0].group) for n in range(1, heads.shape[1] + 1)]
            )
            neuron_line = fit_line([table.seconds("mlp", n) for n in range(1, neurons.shape[1] + 1)])
            found = search_latency(heads, neurons, head_line, neuron_line, share * dense - table.fixed)
        else:
            head_cost = costs.of(kind, subs[0], subs[0].group, 1)
            found = search_macs(heads, neurons, head_cost, costs.of(kind, subs[1], 1, 0), share * dense)
        return self._within_minima(_interleaved(*found), kind, share * dense, costs)

    def _within_minima(self, masks: list[Tensor], kind: str, limit: float, costs: CostModel) -> list[Tensor]:
        """What a sublayer must keep stays, in the place of the least important units elsewhere."""
        subs = self.loaded.sublayers
        for i, s in enumerate(subs):
            if s.min_units and not bool(masks[i].any()):
                masks[i][int(np.argmax(self.fisher[i]))] = True
        while kind != "latency" and costs.total(kind, subs, self._units(masks)) > limit * (1 + 1e-12):
            removable = [
                (float(self.fisher[i][u]), i, u)
                for i, s in enumerate(subs)
                for u in masks[i].nonzero().flatten().tolist()
                if int(masks[i].sum()) > (1 if s.min_units else 0)
            ]
            if not removable:
                raise InfeasibleError("The paper's search finds no masks within the budget.")
            _, i, u = min(removable)
            masks[i][u] = False
        return masks

    def _rearranged(self, masks: list[Tensor]) -> list[Tensor]:
        done = []
        for i, (mask, means) in enumerate(zip(masks, self.means, strict=True)):
            done.append(rearrange(means, mask))
            self.progress("Rearranging", (i + 1) / len(masks))
        return done

    def _units(self, masks: Sequence[Tensor]) -> Kept:
        """Masks of groups as units: query heads or neurons."""
        return tuple(
            tuple(g * s.group + q for g in mask.nonzero().flatten().tolist() for q in range(s.group))
            for s, mask in zip(self.loaded.sublayers, masks, strict=True)
        )

    def _tune(self, teacher: nn.Module, student: nn.Module, kept: Kept) -> int:
        """Section 4.3, and how many sublayers were tuned: the first failure ends it, and the first layer's
        attention is left alone, both as released."""
        loaded, tuned = self.loaded, 0
        first_token = loaded.head in ("classification", "regression")
        last = loaded.sublayers[-1].layer

        def solve(s: Sublayer, fit: Moments, held_out: Moments) -> None:
            nonlocal tuned
            if not kept[s.index] or (s.layer == 0 and s.kind == "attention"):
                return
            consumer = consumer_of(student, loaded.layout, s)
            at = columns(s, kept[s.index]).to(consumer.weight.device)
            moments, weight = fit, consumer.weight[:, at]
            if s.kind == "attention":
                dim = s.unit_dim * s.group
                normal, right = head_system(moments, weight, consumer.bias, dim)
            else:
                dim = 1
                normal, right = neuron_system(moments, weight, consumer.bias)
            scales = solve_scales(normal.cpu(), right.cpu(), len(at) // dim)
            if scales is None:
                raise Enough
            wide = scales.to(weight.device, weight.dtype).repeat_interleave(dim)
            consumer.weight[:, at] = weight * wide
            tuned += 1

        def tokens(b: int, s: Sublayer, batch: Batch, shape: tuple[int, int]) -> Tensor:
            real = token_weights(batch, shape).view(shape)
            if first_token and s.kind == "mlp" and s.layer == last:
                real = torch.zeros_like(real)
                real[:, 0] = 1.0
            return real.flatten()

        side_by_side(
            teacher, student, loaded.layout, loaded.sublayers, self.batches, (), kept, solve, tokens,
            lambda f: self.progress("Tuning masks", f),
        )  # fmt: skip
        return tuned


def _interleaved(heads: Floats, neurons: Floats) -> list[Tensor]:
    """Masks of attention and MLP in the order of sublayers."""
    return [torch.from_numpy(mask.copy()) for pair in zip(heads, neurons, strict=True) for mask in pair]
