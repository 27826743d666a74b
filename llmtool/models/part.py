"""A rank's part of a model as it runs: what it holds, and how it sums and exchanges with the others of its
stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llmtool.parallel.shard import Shard


class Peers(Protocol):
    """The ranks of a stage, of which this is one. All of them make the same calls in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what each rank gives, [..] of one shape and type; in place."""
        ...

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one rank's after the other's. x: [counts[own], ...]."""
        ...

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows x [sum(send), ...], by the rank they go to, for rows [sum(receive), ...] by the rank they come
        from."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    shard: Shard
    peers: Peers
