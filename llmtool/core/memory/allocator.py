"""The allocator's interface: what scheduler and engine may ask of KV memory, whatever the page plan.

All verbs are all-or-nothing: `OutOfPages` leaves the state as it was. Table entries and `PageCopy` fields are
offsets in UNIT bytes. A sequence's `token_ids` list is handed over by reference in `begin` and read again as it
grows, so that pages can be hashed when they fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.ports import PageCopy


class OutOfPages(Exception):
    """Not enough pages. Internal control flow: the scheduler answers it by waiting or preempting."""

    def __init__(self, needed: int, have: int, binding: str) -> None:
        super().__init__(f"{needed} pages of type {binding!r} needed, {have} to be had")
        self.needed = needed
        self.have = have
        self.binding = binding


@dataclass(frozen=True, slots=True)
class Extension:
    """What `extend` changed. new_pages: per group, entries appended. edits: (group, index, entry) overwritten by
    copy-on-write, with the copies that fill them."""

    new_pages: tuple[tuple[int, ...], ...]
    edits: tuple[tuple[int, int, int], ...] = ()
    copies: tuple[PageCopy, ...] = ()


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes of the arena by what they hold; the fields but `arena` sum to `arena`.

    tokens: KV of live tokens. tail: slots of live pages not filled yet. cached: pages nobody uses, kept for their
    prefix. padding: what page plans round up. free: the rest. pages_shared: pages in more than one table.
    """

    arena: int
    tokens: int
    tail: int
    cached: int
    padding: int
    free: int
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_shared: int


Entries = tuple[tuple[int, ...], ...]
"""Table entries per group, in order; of a state, the one it lies in."""


@runtime_checkable
class Handover(Protocol):
    """Sequences whose KV moves between engines of equal page plans. Both sides name the same pages, in the same
    order, from the number of tokens alone: those that the token at position `num_tokens` reads."""

    def lent(self, seq: str, num_tokens: int) -> Entries:
        """Where the KV of the sequence's first `num_tokens` tokens lies, as far as the next token reads it."""
        ...

    def receive(
        self, seq: str, token_ids: Sequence[int], num_tokens: int, *, salt: str = "", headroom: int = 0
    ) -> Entries:
        """Begin a sequence of which so many tokens have been computed elsewhere. Returns where their KV is to be
        written, before the step that reads it. headroom: pages that must be left. Nothing is cached of it before
        `advance`. Raises OutOfPages."""
        ...


class KVAllocator(Protocol):
    groups: tuple[KVCacheGroup, ...]

    def available(self) -> int:
        """Pages that a request could get now: free ones and unreferenced cached ones."""
        ...

    def max_tokens(self) -> int:
        """Tokens of the longest sequence that could run alone."""
        ...

    def pages_for(self, num_tokens: int) -> int:
        """Pages that a fresh sequence of `num_tokens` tokens takes."""
        ...

    def headroom(self, running: int) -> int:
        """Pages to leave for `running` sequences when another begins: half of what each will next want."""
        ...

    def growth_fits(self, growths: Sequence[tuple[str, int]]) -> bool:
        """Can all these sequences grow to these lengths, whatever the order? May say no where they could."""
        ...

    def would_free(self, seq: str) -> int:
        """Pages that become available when this sequence gives up its own."""
        ...

    def begin(
        self,
        seq: str,
        token_ids: Sequence[int],
        max_new: int,
        *,
        salt: str = "",
        headroom: int = 0,
        reuse: bool = True,
        hints: Sequence[int] = (),
    ) -> int:
        """Take over the longest cached prefix of `token_ids` and reserve pages for up to `max_new` more of its
        tokens. At least one token is left to compute. Returns the cached tokens. headroom: pages of the whole
        sequence and `headroom` more must be available, or OutOfPages. reuse=False: take nothing from the cache
        (every position must be computed, for prompt logprobs). hints: lengths of prefixes that later prompts may
        share, such as ends of chat messages."""
        ...

    def extend(self, seq: str, target: int, *, drafts: bool = False) -> Extension | None:
        """Make the sequence `target` tokens long; the new positions are safe to write. None: nothing changed.
        drafts: more of the step that `advance` was told of last, which so is not submitted yet."""
        ...

    def can_extend(self, seq: str, target: int, *, drafts: bool = False) -> bool:
        """Would `extend` succeed now?"""
        ...

    def advance(self, seq: str, num_tokens: int) -> None:
        """The first `num_tokens` tokens are known and computed by steps already submitted: cache full pages."""
        ...

    def can_fork(self, parent: str, num_tokens: int) -> bool:
        """Is what the token at position `num_tokens` reads still there? Windows and states move on."""
        ...

    def fork(self, parent: str, child: str, token_ids: Sequence[int], num_tokens: int) -> None:
        """A new sequence that shares the parent's first `num_tokens` tokens, copy-on-write."""
        ...

    def truncate(self, seq: str, num_tokens: int) -> tuple[int, ...]:
        """Drop positions from `num_tokens` on. Returns pages left in the table, per group."""
        ...

    def table(self, seq: str) -> tuple[tuple[int, ...], ...]:
        """The whole block table, per group."""
        ...

    def swap_out(self, seq: str) -> list[PageCopy] | None:
        """Move the sequence's KV to host memory. None: no room there; nothing changed."""
        ...

    def swap_in(self, seq: str, target: int = 0) -> list[PageCopy]:
        """Bring it back, with room for `target` tokens. Raises OutOfPages."""
        ...

    def preempt(self, seq: str) -> None:
        """Give all pages back; full ones stay cached while nobody needs them. `begin` starts anew."""
        ...

    def end(self, seq: str) -> None:
        """The sequence is over, wherever its KV lies. Its full pages stay in the prefix cache."""
        ...

    def reset_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, while any page is in use."""
        ...

    def usage(self) -> tuple[int, int]:
        """Pages in use, pages cached."""
        ...

    def ledger(self) -> Ledger: ...

    def bill(self, seq: str) -> dict[str, int]:
        """Bytes of one sequence: tokens, tail, padding, shared."""
        ...

    def check(self) -> None:
        """Assert every invariant; cheap enough to run when idle."""
        ...
