"""What growing a sequence takes, worked out before anything is taken: all or nothing over all its tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmtool.core.memory.arena import Arena
from llmtool.core.memory.prefix_index import PrefixIndex
from llmtool.core.memory.sequence_pages import SequencePages
from llmtool.core.memory.state_pages import StatePages
from llmtool.core.memory.tables import Table


class Growth:
    """What growing takes. counts: per type, pages of their own for each of its tables; fresh: of states' tables,
    entries with such a page; copied: (table, index) whose page is replaced by a copy; wants: small pages per
    type."""

    __slots__ = ("copied", "counts", "fresh", "wants")

    def __init__(self, kinds: int) -> None:
        self.counts = [0] * kinds
        self.fresh: dict[int, Collection[int]] = {}
        self.copied: list[tuple[int, int]] = []
        self.wants = [0] * kinds


class Grower:
    """Plans growth over `tables`."""

    def __init__(self, tables: Sequence[Table], arena: Arena, index: PrefixIndex, states: StatePages) -> None:
        self._tables = tables
        # Per type, one of its tables, which are all of one length, its tokens per page and how many there are.
        plain = [t for t in tables if not t.is_state]
        kinds = {t.kind: (t.group, t.tokens, sum(other.kind == t.kind for other in plain)) for t in plain}
        self._plain = [(kind, *rest) for kind, rest in kinds.items()]
        self._arena = arena
        self._index = index
        self._states = states

    def plan(self, state: SequencePages, target: int, optional: bool) -> Growth:
        """optional: with a page for every checkpoint worth having."""
        growth = Growth(len(self._arena.types))
        counts, wants, tables = growth.counts, growth.wants, state.tables
        for kind, group, tokens, many in self._plain:
            more = -(-target // tokens) - len(tables[group])
            if more > 0:
                counts[kind] = more
                wants[kind] = more * many
        for t in self._states.tables:
            have, end = len(tables[t.group]), -(-target // t.tokens)
            if end > have:
                fresh = [i for i in range(have, end) if self._states.turns(state, t, i, optional)]
                growth.fresh[t.group] = fresh
                wants[t.kind] += len(fresh)
        if state.cow and target > state.known:
            self._plan_copies(state, growth)
        return growth

    def _plan_copies(self, state: SequencePages, growth: Growth) -> None:
        """Partly filled pages that others read, or will by their name, are copied before they are written. What is
        written next comes after the known tokens, or after drafts that were right; room may reach further."""
        for t in self._tables:
            table = state.tables[t.group]
            if t.is_state:  # the last page is written in place, whether its tokens are full or not
                at = state.known // t.tokens
                shared = [at] if at < len(table) and self._arena.references(table[-1]) > 1 else []
            else:
                places = {n // t.tokens for n in (state.known, state.length) if n % t.tokens}
                shared = [i for i in sorted(places) if i < len(table) and self._is_read(table[i])]
            growth.copied += [(t.group, i) for i in shared]
            growth.wants[t.kind] += len(shared)

    def _is_read(self, page: int) -> bool:
        return self._arena.references(page) > 1 or page in self._index
