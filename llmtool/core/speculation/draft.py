"""Drafts, who proposes them, and what a step looks like to a controller.

Drafts are deterministic: the target samples every position with a random stream keyed by (seed, position), and a
draft token is accepted while it equals the token sampled there. What is emitted then never depends on the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmtool.core.request import MAX_SPEC

MAX_DEPTH = MAX_SPEC  # draft tokens of one sequence in one step, at most

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Draft:
    """A guess at how a sequence goes on. source: the proposer's name; match: tokens of context it rests on, 0
    where that means nothing."""

    tokens: Sequence[int]
    source: str
    match: int = 0


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
    """A step before drafts are added to it: B decoding sequences, perhaps prompt chunks beside them.

    matches, limits: [B] match length and number of tokens of each draft. sources: [B] numbers of their proposers.
    kv_tokens: context tokens read, summed over sequences. prefill_tokens: of prompt chunks in the step. modelled:
    drafts come from a model that runs once per depth for the whole batch; `limits` says what it could draft.
    """

    matches: Ints
    limits: Ints
    sources: Ints
    kv_tokens: int
    prefill_tokens: int = 0
    modelled: bool = False

    @property
    def batch(self) -> int:
        return len(self.limits)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step without drafts."""
        return self.batch + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What became of a step. lengths: [B] drafts verified, as `plan` returned them; emitted: [B] tokens the target
    gave; matched: [B] leading tokens of the whole draft, verified or not, that equal what was emitted."""

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
