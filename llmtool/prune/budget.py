"""What a pruned model may cost: shares of the dense model's, turned into numbers that no choice exceeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtool.errors import InfeasibleError, UsageError
from llmtool.prune.cost import CostModel
from llmtool.prune.units import Kept, Sublayer

NAMES = {
    "flops": "multiply-accumulates",
    "params": "attention and MLP parameters",
    "kv": "KV bytes per token",
    "latency": "seconds",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """shares: kind -> share of the dense model's cost in (0, 1]. flops and params count what can be pruned:
    attention and MLP, without embeddings, norms and heads on top; kv the cache; latency the whole model."""

    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.shares:
            raise UsageError(
                "There is no budget.", "Give --flops, --latency, --params or --kv, for example --flops 0.5."
            )
        for kind, share in self.shares.items():
            if not 0 < share <= 1:
                raise UsageError(f"--{kind} must be over 0 and at most 1, and is {share:g}.")

    @property
    def is_dense(self) -> bool:
        return all(share == 1 for share in self.shares.values())

    def absolute(self, costs: CostModel, sublayers: Sequence[Sublayer]) -> dict[str, float]:
        """kind -> what the sublayers may cost together. Raises InfeasibleError, naming the smallest feasible share,
        where even the smallest model costs more; UsageError for a KV budget of a model that keeps none."""
        limits = {}
        for kind, share in self.shares.items():
            dense = costs.dense(kind, sublayers)
            if dense <= 0:
                raise UsageError(
                    f"The model keeps no {NAMES[kind]}, so --{kind} has no meaning for it.",
                    "Leave the flag out.",
                )
            fixed = costs.latency.fixed if kind == "latency" and costs.latency else 0.0
            least = costs.total(kind, sublayers, smallest(sublayers))
            if share * dense < least * (1 - 1e-9):
                raise InfeasibleError(
                    f"--{kind} {share:g} is {share * dense:.4g} {NAMES[kind]}, and the smallest model needs "
                    f"{least:.4g}.",
                    f"Give --{kind} {_up(least / dense):.3f} or more.",
                )
            limits[kind] = share * dense - fixed
        return limits

    def eased(self, part: float) -> Budget:
        """The budget after `part` of the way from dense, evenly in the logarithm of cost."""
        return Budget({kind: share**part for kind, share in self.shares.items()})


def smallest(sublayers: Sequence[Sublayer]) -> Kept:
    """The fewest units that every sublayer must keep."""
    return tuple(tuple(range(s.min_units)) for s in sublayers)


def _up(share: float) -> float:
    return min(1.0, -(-share * 1000 // 1) / 1000)
