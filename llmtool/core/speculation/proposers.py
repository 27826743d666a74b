"""Proposers made of other things: a recorded run, or several proposers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmtool.core.speculation.draft import NOTHING, Draft, Proposer
from llmtool.errors import UsageError


class ReplayProposer:
    """Drafts that were recorded: what would have been proposed once a sequence has so many tokens.

    drafts: sequence -> number of tokens known -> the draft. For the virtual clock, and for runs that must repeat.
    """

    name = "replay"

    def __init__(self, drafts: Mapping[str, Mapping[int, Draft]]) -> None:
        self._drafts = drafts
        self._lengths: dict[str, int] = {}

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        self._lengths[seq] = len(token_ids)

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        self._lengths[seq] += len(token_ids)

    def propose(self, seq: str, limit: int) -> Draft:
        draft = self._drafts.get(seq, {}).get(self._lengths[seq], NOTHING)
        return Draft(draft.tokens[:limit], draft.source, draft.match) if limit > 0 else NOTHING

    def finish(self, seq: str) -> None:
        self._lengths.pop(seq, None)


class UnionProposer:
    """Per sequence and step the draft with the longest match; the first proposer's among equals.

    Raises UsageError without members.
    """

    name = "union"

    def __init__(self, members: Sequence[Proposer]) -> None:
        if not members:
            raise UsageError("A union of proposers needs at least one.")
        self.members = tuple(members)

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        for member in self.members:
            member.begin(seq, token_ids, salt)

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        for member in self.members:
            member.observe(seq, token_ids)

    def propose(self, seq: str, limit: int) -> Draft:
        best = NOTHING
        for member in self.members:
            draft = member.propose(seq, limit)
            if draft.tokens and (not best.tokens or draft.match > best.match):
                best = draft
        return best

    def finish(self, seq: str) -> None:
        for member in self.members:
            member.finish(seq)
