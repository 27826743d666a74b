"""What the sequence-level allocator must know of each block table: its reach, its pages per block, its columns in
the prefix index, and which checkpoints of a state are worth a page.

Tables count tokens from the sequence's start, in pages of `tokens`. Entries that lie before what the next token
reads are given up. A state's table has an entry per page's worth of tokens like any other, and most entries name
the same page, which the state is updated in; where two neighbours differ, the former keeps the state as it was at
the boundary between them: a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Protocol

from llmtool.core.memory.geometry import STATES, LayerCacheSpec
from llmtool.core.memory.page_plan import PagePlan

CHECKPOINT_EVERY = 512  # tokens between a state's checkpoints (as Jenga's), at least
RENEW_EVERY = (
    64  # tokens after which a decoding sequence's newest checkpoint takes the place of the one before
)


@dataclass(frozen=True, slots=True)
class Table:
    """One block table. kind: number of its pool, the layer type. columns: of the prefix index, one per page of a
    block, a state has one."""

    group: int
    kind: int
    spec: LayerCacheSpec
    tokens: int
    per_block: int
    columns: range
    is_state: bool

    def first_live(self, num_tokens: int) -> int:
        """The first token that a token at position `num_tokens` reads, itself excluded; of a state, the first of
        the entry that it reads."""
        spec = self.spec
        if self.is_state:
            return max(0, num_tokens - 1) // self.tokens * self.tokens
        if spec.kind == "sliding_window" and spec.window is not None:
            return max(0, num_tokens - spec.window + 1)
        if spec.kind == "chunked" and spec.chunk is not None:
            return num_tokens // spec.chunk * spec.chunk
        return 0

    def peak(self, num_tokens: int, step: int) -> int:
        """The most pages that one sequence of up to `num_tokens` tokens needs at a time, in steps of `step`."""
        spec = self.spec
        if self.is_state:
            return 1
        reach = num_tokens
        if spec.kind == "sliding_window" and spec.window is not None:
            reach = spec.window - 1 + step
        elif spec.kind == "chunked" and spec.chunk is not None:
            reach = spec.chunk - 1 + step
        whole = -(-num_tokens // self.tokens)
        return whole if reach >= num_tokens else min(whole, -(-reach // self.tokens) + 1)


@dataclass(frozen=True, slots=True)
class Tables:
    """All tables of a plan. block: tokens that are hashed together, a whole number of pages of every table.
    columns: per layer type, its columns of the prefix index."""

    tables: tuple[Table, ...]
    block: int
    columns: tuple[range, ...]

    @classmethod
    def of(cls, plan: PagePlan) -> Tables:
        block = lcm(*(pool.tokens_per_page for pool in plan.pools))
        tables: list[Table] = []
        columns: list[range] = []
        for kind, pool in enumerate(plan.pools):
            start = columns[-1].stop if columns else 0
            at = start
            for group in pool.groups:
                spec = group.layers[0]
                is_state = spec.kind in STATES
                per_block = block // group.tokens_per_page
                width = 1 if is_state else per_block
                tables.append(
                    Table(
                        len(tables),
                        kind,
                        spec,
                        group.tokens_per_page,
                        per_block,
                        range(at, at + width),
                        is_state,
                    )
                )
                at += width
            columns.append(range(start, at))
        return cls(tuple(tables), block, tuple(columns))


def worth_a_checkpoint(position: int, block: int, every: int = CHECKPOINT_EVERY) -> bool:
    """Whether a prefix of so many tokens keeps its state without being asked to. Checkpoints lie `every` tokens
    apart, and far into a prompt an eighth of the power of two below: a long one has few, and a branch at any place
    loses little."""
    apart = max(every, 1 << max(0, position.bit_length() - 4))
    return position > 0 and position // apart != (position - block) // apart


class PlanPages:
    """How many large pages of a plan sequences need. step_tokens: the most that one step computes of a sequence."""

    def __init__(self, plan: PagePlan, step_tokens: int) -> None:
        self.page_bytes = plan.large_page
        self._per_large = [pool.per_large for pool in plan.pools]
        self._tables = Tables.of(plan).tables
        self._step = step_tokens

    def pages(self, num_tokens: int) -> int:
        """Of one sequence that grows to `num_tokens` tokens by itself, at its most."""
        return self._large([t.peak(num_tokens, self._step) for t in self._tables])

    def least(self, sequences: int) -> int:
        """Of so many sequences with a small page in every table."""
        return self._large([sequences for _ in self._tables])

    def _large(self, small: Sequence[int]) -> int:
        wants = [0] * len(self._per_large)
        for t, pages in zip(self._tables, small, strict=True):
            wants[t.kind] += pages
        return sum(-(-want // k) for want, k in zip(wants, self._per_large, strict=True))


class Pages(Protocol):
    """Pages of PlanPages, or of a KVCacheGroup."""

    @property
    def page_bytes(self) -> int: ...

    def pages(self, num_tokens: int) -> int: ...

    def least(self, sequences: int) -> int: ...


def longest(sizes: Pages, num_pages: int, limit: int = 1 << 31) -> int:
    """Tokens, at most `limit`, of the longest sequence that `num_pages` pages hold."""
    if sizes.pages(limit) <= num_pages:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if sizes.pages(middle) <= num_pages:
            low = middle
        else:
            high = middle
    return low
