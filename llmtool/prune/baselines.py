"""Methods for the record: magnitude, random, Wanda-sp and FLAP.

Wanda-sp and FLAP as FLAP's authors define them (arXiv 2312.11983, sections 4.1 to 4.3 and 5.1). A KV group with its
query heads is one unit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.prune.batches import Item, batches
from llmtool.prune.budget import Budget
from llmtool.prune.cost import CostModel
from llmtool.prune.model import Loaded
from llmtool.prune.modeling import layers_of
from llmtool.prune.obs import Result, erase
from llmtool.prune.units import Kept, Sublayer, all_units, columns, consumer_of

METHODS = ("magnitude", "random", "wanda-sp", "flap")
Progress = Callable[[str, float], None]


class Baseline:
    """One calibration, and any number of budgets."""

    def __init__(
        self,
        method: str,
        loaded: Loaded,
        items: Sequence[Item],
        seed: int,
        progress: Progress = lambda what, fraction: None,
    ) -> None:
        assert method in METHODS
        self.method, self.loaded = method, loaded
        self.means: list[Tensor] = []
        squares: list[Tensor] = []
        if method in ("wanda-sp", "flap"):
            self.means, squares = _input_moments(loaded, items, progress)
        generator = torch.Generator().manual_seed(seed)
        self.scores = [
            _scores(method, loaded, s, self.means[i] if self.means else None, squares[i] if squares else None,
            generator) for i, s in enumerate(loaded.sublayers)
        ]  # fmt: skip

    def prune(self, budget: Budget, costs: CostModel) -> Result:
        """Raises InfeasibleError."""
        loaded = self.loaded
        model = copy.deepcopy(loaded.model)
        if budget.is_dense:
            return Result(model, all_units(loaded.sublayers))
        limits = budget.absolute(costs, loaded.sublayers)

        def fits(kept: Kept) -> bool:
            return all(
                sum(
                    costs.of(k, s, len(u), len(u) // s.group if s.kind == "attention" else 0)
                    for s, u in zip(loaded.sublayers, kept, strict=True)
                )
                <= limit
                for k, limit in limits.items()
            )

        kept = self._global(fits) if self.method == "flap" else self._even(fits)
        added = False
        if self.method == "flap":
            added = self._add_baseline(model, kept)
        erase(loaded, model, kept)
        return Result(model, kept, notes={"biases_added": added} if self.method == "flap" else {})

    def _even(self, fits: Callable[[Kept], bool]) -> Kept:
        """The same share of every sublayer, the largest that fits."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(self._share(middle)) else (low, middle)
        return self._share(low)

    def _share(self, share: float) -> Kept:
        kept = []
        for s, scores in zip(self.loaded.sublayers, self.scores, strict=True):
            count = max(int(share * s.num_groups + 1e-9), 1 if s.min_units else 0)
            kept.append(_units(s, scores.argsort(descending=True, stable=True)[:count].tolist()))
        return tuple(kept)

    def _global(self, fits: Callable[[Kept], bool]) -> Kept:
        """FLAP's AL-AM: scores standardised in every sublayer, then the lowest of all go until the budget holds."""
        ranked: list[tuple[float, int, int]] = []
        for i, scores in enumerate(self.scores):
            normal = (scores - scores.mean()) / (scores.std() + 1e-12)
            ranked += [(float(x), i, u) for u, x in enumerate(normal)]
        ranked.sort()
        low, high = 0, len(ranked)  # how many go
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self._without(ranked[:middle])) else (middle + 1, high)
        return self._without(ranked[:low])

    def _without(self, gone: Sequence[tuple[float, int, int]]) -> Kept:
        removed: list[set[int]] = [set() for _ in self.scores]
        for _, i, unit in gone:
            removed[i].add(unit)
        kept = []
        for s, scores, out in zip(self.loaded.sublayers, self.scores, removed, strict=True):
            left = [u for u in range(s.num_groups) if u not in out]
            if s.min_units and not left:
                left = [int(scores.argmax())]
            kept.append(_units(s, left))
        return tuple(kept)

    @torch.no_grad()
    def _add_baseline(self, model: nn.Module, kept: Kept) -> bool:
        """FLAP's bias compensation: what the pruned units give on average. Whether the model has a place for it."""
        loaded = self.loaded
        for s, units in zip(loaded.sublayers, kept, strict=True):
            gone = sorted(set(range(s.num_units)) - set(units))
            consumer = consumer_of(model, loaded.layout, s)
            if consumer.bias is None and loaded.family != "llama":
                return False
            at = columns(s, gone)
            shift = consumer.weight[:, at] @ self.means[s.index][at].to(consumer.weight.device)
            old = consumer.bias if consumer.bias is not None else torch.zeros_like(shift)
            consumer.bias = nn.Parameter(old + shift, requires_grad=False)
        return True


def _units(s: Sublayer, groups: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(g * s.group + q for g in groups for q in range(s.group)))


@torch.no_grad()
def _scores(
    method: str,
    loaded: Loaded,
    s: Sublayer,
    mean: Tensor | None,
    square: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """[groups]: the higher, the more a unit matters."""
    weight = consumer_of(loaded.model, loaded.layout, s).weight.float().cpu()
    if method == "random":
        return torch.rand(s.num_groups, generator=generator)
    if method == "magnitude":
        columns_ = weight.square().sum(0)
        layer = layers_of(loaded.model, loaded.layout)[s.layer]
        if s.kind == "mlp":
            for name in loaded.layout.inner:
                inner: Any = layer.get_submodule(name)
                columns_ = columns_ + inner.weight.float().cpu().square().sum(1)
        return columns_.unflatten(0, (s.num_groups, -1)).sum(1)
    assert mean is not None and square is not None
    if method == "wanda-sp":  # sum over outputs of |W_ij| ||x_j||
        columns_ = weight.abs().sum(0) * square.sqrt()
    else:  # FLAP's weighted input feature variance
        columns_ = weight.square().sum(0) * (square - mean.square()).clamp(min=0)
    return columns_.unflatten(0, (s.num_groups, -1)).mean(1)


@torch.no_grad()
def _input_moments(
    loaded: Loaded, items: Sequence[Item], progress: Progress
) -> tuple[list[Tensor], list[Tensor]]:
    """Of what each consumer reads, mean and mean square over tokens [in]."""
    consumers = [consumer_of(loaded.model, loaded.layout, s) for s in loaded.sublayers]
    sums = [torch.zeros(c.in_features, dtype=torch.float64) for c in consumers]
    squares = [torch.zeros(c.in_features, dtype=torch.float64) for c in consumers]
    count, device = 0, next(loaded.model.parameters()).device
    real: list[Tensor | None] = [None]

    def watcher(i: int) -> Any:
        def on_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0] if real[0] is None else inputs[0][real[0]]
            x = x.reshape(-1, x.shape[-1])
            sums[i] += x.sum(0).double().cpu()
            squares[i] += x.square().sum(0).double().cpu()

        return on_input

    hooks = [c.register_forward_pre_hook(watcher(i)) for i, c in enumerate(consumers)]
    parts = batches(items, 16, loaded.pad_id)
    try:
        for at, part in enumerate(parts):
            on_device = part.to(device)
            real[0] = on_device.tokens
            loaded.model(**on_device.inputs)
            tokens = part.tokens
            count += len(part) if tokens is None else int(tokens.sum())
            progress("Calibrating", (at + 1) / len(parts))
    finally:
        for hook in hooks:
            hook.remove()
    if real[0] is None and parts:  # images: all patches of all layers alike
        count = count * int(loaded.model.config.image_size // loaded.model.config.patch_size) ** 2 + count
    return [(x / count).float() for x in sums], [(x / count).float() for x in squares]
