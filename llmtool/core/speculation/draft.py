"""Drafts, who proposes them, and what a step looks like to a controller.

Drafts are deterministic: the target samples every position with a random stream keyed by (seed, position), and a
draft token is accepted while it equals the token sampled there. What is emitted then never depends on the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmtool.core.request import MAX_SPEC

MAX_DEPTH = MAX_SPEC  # draft tokens of one sequence in one step, at most

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
NONE: Ints = np.zeros(0, np.int64)
MAX_BRANCHES = 8  # of one draft, itself included
MAX_NODES = 63  # of one tree: attention has a bit for each and one for the root


@dataclass(frozen=True, slots=True)
class Branch:
    """Another way that a draft may go on: by `tokens`, after the first `at` tokens of its branch number `on` (0 is
    the draft itself; of another, `at` is at least 1). match: as a draft's."""

    tokens: Sequence[int]
    match: int
    on: int
    at: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A guess at how a sequence goes on. source: the proposer's name; match: tokens of context it rests on, 0
    where that means nothing. branches: what makes a tree of it, each after those that it leaves."""

    tokens: Sequence[int]
    source: str
    match: int = 0
    branches: Sequence[Branch] = ()

    def path(self, branch: int, length: int) -> list[int]:
        """The tokens from the tree's root to the first `length` of a branch, 0 being the draft itself."""
        if branch == 0:
            return list(self.tokens[:length])
        this = self.branches[branch - 1]
        return self.path(this.on, this.at) + list(this.tokens[:length])

    def flatten(self, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
        """(tokens, parents) of the tree of so many tokens of the draft and of each of its branches; those whose
        token to leave is not there are left out. parents: index of each token's, before it; -1 is the root."""
        tokens, parents, starts = list(self.tokens[: lengths[0]]), list(range(-1, lengths[0] - 1)), [0]
        taken = [lengths[0]]
        for branch, length in zip(self.branches, lengths[1:], strict=True):
            taken.append(length if branch.at <= taken[branch.on] else 0)
            starts.append(len(tokens))
            if branch.at:
                parent = starts[branch.on] + branch.at - 1
            else:
                parent = -1
            for token in branch.tokens[: taken[-1]]:
                tokens.append(token)
                parents.append(parent)
                parent = len(tokens) - 1
        return tokens, parents


NOTHING = Draft((), "", 0)


class Proposer(Protocol):
    """Guesses continuations. It is told of every token of a sequence, in order, whether it guesses or not."""

    name: str

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        """A sequence with all tokens known so far. Only sequences with the same salt may learn of each other."""
        ...

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        """The sequence went on by these tokens."""
        ...

    def propose(self, seq: str, limit: int) -> Draft:
        """Up to `limit` tokens that may follow; an empty draft when there is nothing to say."""
        ...

    def finish(self, seq: str) -> None:
        """The sequence is over. Unknown ones are ignored."""
        ...


@dataclass(frozen=True, slots=True)
class StepView:
    """A step before drafts are added to it: B decoding sequences, perhaps prompt chunks beside them, and X branches
    of their drafts.

    matches, limits: [B + X] match length and number of tokens of each draft, then of each branch. sources: [B + X]
    numbers of their proposers; branches have numbers of their own. on, at: [X] the row that each branch leaves, and
    after how many of its tokens. kv_tokens: context tokens read, summed over sequences. prefill_tokens: of prompt
    chunks in the step. modelled: drafts come from a model that runs once per depth for the whole batch; `limits`
    says what it could draft.
    """

    matches: Ints
    limits: Ints
    sources: Ints
    kv_tokens: int
    prefill_tokens: int = 0
    modelled: bool = False
    on: Ints = field(default_factory=lambda: NONE)
    at: Ints = field(default_factory=lambda: NONE)

    @property
    def batch(self) -> int:
        return len(self.limits) - len(self.on)

    def chains(self) -> StepView:
        """The same without the branches."""
        b = self.batch
        if not len(self.on):
            return self
        limits, sources = self.limits[:b], self.sources[:b]
        return replace(self, matches=self.matches[:b], limits=limits, sources=sources, on=NONE, at=NONE)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step without drafts."""
        return self.batch + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What became of a step. lengths: [B + X] drafts verified, as `plan` returned them; emitted: [B + X] tokens the
    target gave, for a branch after the token that it leaves, 0 where that is not what was emitted; matched: [B + X]
    leading tokens of the whole draft or branch, verified or not, that equal what was emitted."""

    view: StepView
    lengths: Ints
    emitted: Ints
    matched: Ints
    seconds: float

    @property
    def num_tokens(self) -> int:
        return self.view.num_tokens + int(self.lengths.sum())


def leading_matches(draft: Sequence[int], emitted: Sequence[int]) -> int:
    """How many leading tokens agree."""
    count = 0
    for guess, token in zip(draft, emitted, strict=False):
        if guess != token:
            break
        count += 1
    return count
