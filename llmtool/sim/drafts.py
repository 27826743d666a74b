"""Made-up drafts: right so often, and nothing more.

The law: at a moment a sequence has a draft with a chance of `coverage`, and each of its tokens is right with a
chance of `acceptance`, whatever came before. A verified token costs what another sequence's token costs, its
sequence's context is read once a step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from llmtool.core.speculation.build import controller_of
from llmtool.core.speculation.draft import MAX_DEPTH, NOTHING, Draft
from llmtool.core.speculation.speculator import Speculator
from llmtool.sim.deployment import Drafting

TOKEN = 1  # what every sequence says


class SyntheticProposer:
    """Drafts by the law above."""

    name = "synthetic"

    def __init__(self, acceptance: float, coverage: float = 1.0, seed: int = 0) -> None:
        law = Drafting("auto", acceptance, coverage)
        self._acceptance, self._coverage = law.acceptance, law.coverage
        self._rng = random.Random(seed)

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        pass

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        pass

    def propose(self, seq: str, limit: int) -> Draft:
        rng = self._rng
        if rng.random() >= self._coverage:
            return NOTHING
        tokens = [
            TOKEN if rng.random() < self._acceptance else TOKEN + 1 for _ in range(min(limit, MAX_DEPTH))
        ]
        return Draft(tokens, self.name, 4)

    def finish(self, seq: str) -> None:
        pass


def speculator_of(drafting: Drafting | None, seed: int = 0) -> Speculator | None:
    """What a scheduler asks for drafts. Raises UsageError for an unknown spec."""
    controller = None if drafting is None else controller_of(drafting.spec)
    if drafting is None or controller is None:
        return None
    return Speculator(controller, SyntheticProposer(drafting.acceptance, drafting.coverage, seed))
