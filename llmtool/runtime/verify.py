"""Drafts in a step's batch: whose logits are looked at, and which drafts the target would have sampled itself.

A sequence with k drafts has k + 1 rows: the one after its last known token, and one after each draft. A row's token
depends on its request's seed and its position (`random`), so a draft is accepted while it equals the token sampled
in its place: what is emitted are the tokens of decoding one by one, greedy or sampled, whatever was drafted. Drafts
may be trees; then the place of a draft is after the one it follows, and acceptance is a walk from the root.
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
    row, which sequence it is, and the row's number in it. depths: [S] how many tokens are before it that are no
    more than drafts: in a chain its number. parents: [B] of trees, as in ScheduledRequest, () of chains."""

    drafts: Sequence[Sequence[int]]
    drafted: Ints
    rows: Ints
    owners: Ints
    offsets: Ints
    depths: Ints
    parents: Sequence[Sequence[int]]

    @classmethod
    def of(
        cls, drafts: Sequence[Sequence[int]], rows: Ints, parents: Sequence[Sequence[int]] = ()
    ) -> SampledRows:
        drafted = np.array([len(draft) for draft in drafts], np.int64)
        owners = np.arange(len(drafts))
        parents = parents or [()] * len(drafts)
        if not drafted.any():
            zeros = np.zeros_like(owners)
            return cls(drafts, drafted, rows, owners, zeros, zeros, parents)
        owners = np.repeat(owners, drafted + 1)
        first = np.cumsum(drafted + 1) - (drafted + 1)
        offsets = np.arange(len(owners)) - first[owners]
        depths = offsets
        if any(parents):
            depths = offsets.copy()
            for begin, above in zip(first.tolist(), parents, strict=True):
                if above:
                    depths[begin : begin + len(above) + 1] = depths_of(above)
        return cls(drafts, drafted, rows[owners], owners, offsets, depths, parents)

    def spread(self, values: Ints) -> Ints:
        """[S] of what each sequence has [B]."""
        return values[self.owners]

    def before(self, owner: int, offset: int) -> int:
        """The number of the row that row `offset` of a sequence follows; it is not its first."""
        above = self.parents[owner]
        return above[offset - 1] + 1 if above else offset - 1

    def ahead(self) -> Sequence[Sequence[int]]:
        """[S] the drafts before each row; () when there are none at all."""
        if len(self.owners) == len(self.drafts):
            return ()
        out: list[Sequence[int]] = []
        begin = 0
        for owner, draft in enumerate(self.drafts):
            if not self.parents[owner]:
                out += [draft[:offset] for offset in range(len(draft) + 1)]
            else:
                out.append(())
                for offset in range(1, len(draft) + 1):
                    out.append((*out[begin + self.before(owner, offset)], draft[offset - 1]))
            begin += len(draft) + 1
        return out

    def accepted(
        self, sampled: Sequence[int], broken: Container[int]
    ) -> Iterator[tuple[Sequence[int], list[int]]]:
        """Per sequence its rows on the path of right drafts, from its first, and their tokens: those that equal its
        drafts and the one after them.

        broken: rows that could not be sampled. There a sequence stops short; with its first row it has no tokens.
        """
        begin = 0
        for draft, parents in zip(self.drafts, self.parents, strict=True):
            end = begin + len(draft)
            if parents:
                yield self._walk(begin, draft, parents, sampled, broken)
            else:
                tokens: list[int] = []
                for row in range(begin, end + 1):
                    if row in broken:
                        break
                    tokens.append(sampled[row])
                    if row == end or tokens[-1] != draft[row - begin]:
                        break
                yield range(begin, begin + max(1, len(tokens))), tokens
            begin = end + 1

    @staticmethod
    def _walk(
        begin: int,
        draft: Sequence[int],
        parents: Sequence[int],
        sampled: Sequence[int],
        broken: Container[int],
    ) -> tuple[list[int], list[int]]:
        """`accepted` of one tree. Of equal drafts after the same token the first counts."""
        rows, tokens, node = [begin], [], -1  # node: the draft that the last row is after
        while begin + node + 1 not in broken:
            token = sampled[begin + node + 1]
            tokens.append(token)
            after = (i for i in range(node + 1, len(draft)) if parents[i] == node and draft[i] == token)
            node = next(after, -2)
            if node < 0 or begin + node + 1 in broken:
                break
            rows.append(begin + node + 1)
        return rows, tokens


def depths_of(parents: Sequence[int]) -> list[int]:
    """[nodes + 1] of a tree's root, 0, and of its nodes."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    return depths


def words_of(parents: Sequence[int]) -> list[int]:
    """[nodes + 1] int64 of the root and the nodes: a bit for each that a node sees (AttentionBatch.tree)."""
    words = [1]
    for i, parent in enumerate(parents, 1):
        words.append(words[parent + 1] | 1 << i)
    return [word - (1 << 64) if word >> 63 else word for word in words]
