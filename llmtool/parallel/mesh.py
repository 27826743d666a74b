"""Mesh: the ranks of one engine, and where each stands."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llmtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands. stage: of the pipeline. tensor: its part of the stage's tensors. expert_group,
    expert_part: which experts of the stage it holds, and which part of each. node, local: which machine, and its
    number there."""

    rank: int
    stage: int
    tensor: int
    expert_group: int
    expert_part: int
    node: int
    local: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """`pp` stages, one after the other, of `tp` ranks each; the ranks of a stage are neighbours, as in vLLM.

    ep: groups that a stage's experts are dealt to; each expert is then cut into tp / ep parts. layers: of each
    stage; () is as even as can be. nodes: machines, each with as many ranks. Raises UsageError for sizes that do
    not fit."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    nodes: int = 1
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep", "nodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"The {name} size is {getattr(self, name)}.", "Give 1 or more.")
        if self.tp % self.ep:
            raise UsageError(f"{self.ep} groups of experts do not divide a stage of {self.tp} ranks.")
        if self.world % self.nodes:
            raise UsageError(
                f"{self.world} ranks (tensor parallel {self.tp} x pipeline parallel {self.pp}) do not divide over "
                f"{self.nodes} nodes.",
                "Take a number of nodes that divides them.",
            )

    @property
    def world(self) -> int:
        return self.tp * self.pp

    @property
    def per_node(self) -> int:
        return self.world // self.nodes

    @property
    def expert_tp(self) -> int:
        """Parts that each expert is cut into."""
        return self.tp // self.ep

    def place(self, rank: int) -> Place:
        assert 0 <= rank < self.world
        stage, tensor = divmod(rank, self.tp)
        group, part = divmod(tensor, self.expert_tp)
        node, local = divmod(rank, self.per_node)
        return Place(rank, stage, tensor, group, part, node, local)

    def rank_of(self, stage: int, tensor: int) -> int:
        return stage * self.tp + tensor

    def stage_ranks(self, stage: int) -> range:
        """The ranks of a stage, which sum their parts."""
        return range(stage * self.tp, (stage + 1) * self.tp)

    def node_ranks(self, node: int) -> range:
        return range(node * self.per_node, (node + 1) * self.per_node)

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """The layers of each stage; the first ones take what does not divide, as the last also has the head.

        Raises UsageError where there are too few, or where `layers` is another number of them.
        """
        if self.pp > num_layers:
            raise UsageError(
                f"The model's {num_layers} layers are too few for {self.pp} stages.",
                f"Set --pipeline-parallel-size to {num_layers} or less.",
            )
        counts = self.layers or tuple(len(part) for part in split(num_layers, self.pp))
        if len(counts) != self.pp or sum(counts) != num_layers or min(counts) < 1:
            raise UsageError(
                f"The stages' layers are {'+'.join(map(str, counts))}, and the model has {num_layers} for "
                f"{self.pp} stages.",
                "Name as many positive numbers as there are stages, with the model's layers as their sum.",
            )
        ends = [sum(counts[: i + 1]) for i in range(self.pp)]
        return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def split(count: int, parts: int) -> tuple[range, ...]:
    """0..count in `parts` ranges as equal as can be, the larger ones first."""
    base, rest = divmod(count, parts)
    ends = [i * base + min(i, rest) for i in range(parts + 1)]
    return tuple(range(a, b) for a, b in pairwise(ends))
