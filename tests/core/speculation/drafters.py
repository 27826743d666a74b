"""Proposers that know, or pretend to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from llmtool.core.speculation.draft import NOTHING, Draft

Truth = Callable[[Sequence[int], str], int]
"""(all tokens so far, sequence id) -> the token that the target says next"""


class Knowing:
    """Right for a while, with a chance of `chance` per token. wrong: makes a wrong token of a right one."""

    name = "knowing"

    def __init__(
        self,
        truth: Truth,
        chance: float,
        wrong: Callable[[int], int] = lambda token: token + 1,
        seed: int = 0,
    ) -> None:
        self._truth, self._chance, self._wrong = truth, chance, wrong
        self._rng = random.Random(seed)
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, list[int]] = {}

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        assert seq not in self.tokens
        self.tokens[seq] = list(token_ids)

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        self.tokens[seq] += token_ids

    def propose(self, seq: str, limit: int) -> Draft:
        known, draft = list(self.tokens[seq]), []
        for _ in range(limit):
            token = self._truth(known, seq)
            known.append(token)
            draft.append(token if self._rng.random() < self._chance else self._wrong(token))
        return Draft(draft, self.name, 5) if draft else NOTHING

    def finish(self, seq: str) -> None:
        self.finished[seq] = self.tokens.pop(seq)
