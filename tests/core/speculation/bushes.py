"""A proposer of trees that knows, or pretends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmtool.core.speculation.draft import NOTHING, Branch, Draft
from tests.core.speculation.drafters import Knowing, Truth


class Bushy(Knowing):
    """Right for a while, and where it goes wrong other branches may know better: each is right for a while with the
    same chance, and leaves the branch before it at its first wrong token, or anywhere."""

    name = "bushy"

    def __init__(
        self, truth: Truth, chance: float, wrong: Callable[[int], int], seed: int = 0, branches: int = 4
    ) -> None:
        super().__init__(truth, chance, wrong, seed)
        self.branches = branches

    def propose(self, seq: str, limit: int) -> Draft:
        draft = super().propose(seq, limit)
        if not draft.tokens:
            return NOTHING
        ways, branches = [(list(draft.tokens), 0)], []  # tokens of a branch, and its depth
        for _ in range(self._rng.randint(0, self.branches - 1)):
            on = self._rng.randrange(len(ways))
            tokens, depth = ways[on]
            known = self.tokens[seq] + Draft(draft.tokens, "", 0, branches).path(on, 0)
            at = 0
            while at < len(tokens) and tokens[at] == self._truth([*known, *tokens[:at]], seq):
                at += 1
            if self._rng.random() < 0.3:
                at = self._rng.randint(0, len(tokens))
            if (on and not at) or depth + at >= limit:
                continue
            way = self._way([*known, *tokens[:at]], seq, self._rng.randint(1, limit - depth - at))
            branches.append(Branch(way, self._rng.randint(2, 20), on, at))
            ways.append((way, depth + at))
        return Draft(draft.tokens, self.name, 5, branches)

    def _way(self, known: list[int], seq: str, length: int) -> Sequence[int]:
        way: list[int] = []
        for _ in range(length):
            token = self._truth([*known, *way], seq)
            way.append(token if self._rng.random() < max(self._chance, 0.5) else self._wrong(token))
        return way
