"""Drafts in a step's batch: whose logits are looked at, and which drafts the target would have sampled itself.

A sequence with k drafts has k + 1 rows: the one after its last known token, and one after each draft. A row's token
depends on its request's seed and its position (`random`), so a draft is accepted while it equals the token sampled
in its place: what is emitted are the tokens of decoding one by one, greedy or sampled, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """S rows of B sequences. drafts, drafted: [B] and their lengths. rows, owners, offsets: [S] the sequence's
    row, which sequence it is, and how many drafts are before it."""

    drafts: Sequence[Sequence[int]]
    drafted: Ints
    rows: Ints
    owners: Ints
    offsets: Ints

    @classmethod
    def of(cls, drafts: Sequence[Sequence[int]], rows: Ints) -> SampledRows:
        drafted = np.array([len(draft) for draft in drafts], np.int64)
        owners = np.arange(len(drafts))
        if not drafted.any():
            return cls(drafts, drafted, rows, owners, np.zeros_like(owners))
        owners = np.repeat(owners, drafted + 1)
        first = np.cumsum(drafted + 1) - (drafted + 1)
        return cls(drafts, drafted, rows[owners], owners, np.arange(len(owners)) - first[owners])

    def spread(self, values: Ints) -> Ints:
        """[S] of what each sequence has [B]."""
        return values[self.owners]

    def ahead(self) -> Sequence[Sequence[int]]:
        """[S] the drafts before each row; () when there are none at all."""
        if len(self.owners) == len(self.drafts):
            return ()
        pairs = zip(self.owners.tolist(), self.offsets.tolist(), strict=True)
        return [self.drafts[owner][:offset] for owner, offset in pairs]

    def accepted(self, sampled: Sequence[int], broken: Container[int]) -> Iterator[tuple[int, list[int]]]:
        """Per sequence its first row, and its tokens: those that equal its drafts and the one after them.

        broken: rows that could not be sampled. There a sequence stops short; with its first row it has no tokens.
        """
        begin = 0
        for draft in self.drafts:
            tokens: list[int] = []
            for offset in range(len(draft) + 1):
                if begin + offset in broken:
                    break
                tokens.append(sampled[begin + offset])
                if offset == len(draft) or tokens[-1] != draft[offset]:
                    break
            yield begin, tokens
            begin += len(draft) + 1
