"""What came before paging: one contiguous reservation per sequence, made by a buddy allocator (PagedAttention,
sections 3.1 and 6.1, "Orca"). Kept so that anyone can measure what paging gains, by the same scheduler.

How much is reserved: `max` the model's maximum length, `pow2` at most twice what the sequence needs (the output
limit rounded up to a power of two), `oracle` exactly what it will use. No sharing: siblings copy their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmtool.core.memory.allocator import Extension, Ledger, OutOfPages
from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.ports import PageCopy

Reservation = Callable[[str, int], int]
"""(sequence id, prompt tokens) -> tokens to reserve for prompt and output"""


class _Buddy:
    """Offsets 0 .. 2**order - 1 in blocks of powers of two. `limit` cuts the last, partial power of two off."""

    def __init__(self, limit: int) -> None:
        self._free: dict[int, set[int]] = {}
        at = 0
        for bit in reversed(range(limit.bit_length())):
            if limit & (1 << bit):
                self._free.setdefault(bit, set()).add(at)
                at += 1 << bit

    @staticmethod
    def order(size: int) -> int:
        return max(0, (size - 1).bit_length())

    def fits(self, size: int) -> bool:
        return any(blocks and order >= self.order(size) for order, blocks in self._free.items())

    def take(self, size: int) -> int:
        wanted = self.order(size)
        order = min(o for o, blocks in self._free.items() if blocks and o >= wanted)
        at = min(self._free[order])
        self._free[order].remove(at)
        while order > wanted:
            order -= 1
            self._free.setdefault(order, set()).add(at + (1 << order))
        return at

    def give(self, at: int, size: int) -> None:
        order = self.order(size)
        while (at ^ (1 << order)) in self._free.get(order, ()):
            self._free[order].remove(at ^ (1 << order))
            at &= ~(1 << order)
            order += 1
        self._free.setdefault(order, set()).add(at)


class _Chunk:
    __slots__ = ("at", "length", "reserved")

    def __init__(self, at: int, reserved: int, length: int) -> None:
        self.at = at
        self.reserved = reserved
        self.length = length


class ContiguousAllocator:
    """group: pages of one token each (the unit of the accounts). num_tokens: KV slots in all."""

    def __init__(self, group: KVCacheGroup, num_tokens: int, reserve: Reservation) -> None:
        assert group.tokens_per_page == 1
        self.groups: tuple[KVCacheGroup, ...] = (group,)
        self._tokens = num_tokens
        self._reserve = reserve
        self._buddy = _Buddy(num_tokens)
        self._chunks: dict[str, _Chunk] = {}

    # A sequence's reservation is all it ever gets, so running sequences never lack memory and are never
    # preempted: admission is the only question, and `begin` answers it.

    def available(self) -> int:
        return self._tokens

    def pages_for(self, num_tokens: int) -> int:
        return 0

    def max_tokens(self) -> int:
        return 1 << (self._tokens.bit_length() - 1)

    def headroom(self, running: int) -> int:
        return 0

    def growth_fits(self, growths: Sequence[tuple[str, int]]) -> bool:
        return True

    def would_free(self, seq: str) -> int:
        return self._chunks[seq].reserved

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
        self._start(seq, len(token_ids), min(len(token_ids), max_new))
        return 0

    def _start(self, seq: str, prompt: int, length: int) -> None:
        size = max(prompt + 1, self._reserve(seq, prompt))
        if not self._buddy.fits(size):
            raise OutOfPages(size, 0, "contiguous")
        self._chunks[seq] = _Chunk(self._buddy.take(size), size, length)

    def extend(self, seq: str, target: int, *, drafts: bool = False) -> Extension | None:
        chunk = self._chunks[seq]
        assert target <= chunk.reserved, "a reservation is for the whole sequence"
        chunk.length = max(chunk.length, target)
        return None

    def can_extend(self, seq: str, target: int, *, drafts: bool = False) -> bool:
        return True

    def advance(self, seq: str, num_tokens: int) -> None:
        pass

    def can_fork(self, parent: str, num_tokens: int) -> bool:
        return True

    def fork(self, parent: str, child: str, token_ids: Sequence[int], num_tokens: int) -> None:
        self._start(child, num_tokens, num_tokens)

    def truncate(self, seq: str, num_tokens: int) -> tuple[int, ...]:
        chunk = self._chunks[seq]
        chunk.length = min(chunk.length, num_tokens)
        return (chunk.reserved,)

    def table(self, seq: str) -> tuple[tuple[int, ...], ...]:
        return ((self._chunks[seq].at,),)

    def swap_out(self, seq: str) -> list[PageCopy] | None:
        return None

    def swap_in(self, seq: str, target: int = 0) -> list[PageCopy]:
        raise AssertionError("nothing is ever swapped out")

    def preempt(self, seq: str) -> None:
        self.end(seq)

    def end(self, seq: str) -> None:
        chunk = self._chunks.pop(seq, None)
        if chunk is not None:
            self._buddy.give(chunk.at, chunk.reserved)

    def reset_cache(self) -> bool:
        return not self._chunks

    def usage(self) -> tuple[int, int]:
        return sum(1 << _Buddy.order(c.reserved) for c in self._chunks.values()), 0

    def waste(self) -> dict[str, int]:
        """Slots by what they hold: tokens; reserved for tokens to come, or never used; rounded up by the buddy
        allocator; and outside any reservation."""
        tokens = sum(c.length for c in self._chunks.values())
        reserved = sum(c.reserved for c in self._chunks.values())
        blocks = self.usage()[0]
        return {
            "tokens": tokens,
            "reserved": reserved - tokens,
            "rounding": blocks - reserved,
            "outside": self._tokens - blocks,
        }

    def ledger(self) -> Ledger:
        group, slots = self.groups[0], self.waste()
        token = group.page_bytes
        return Ledger(
            arena=self._tokens * token,
            tokens=slots["tokens"] * token,
            tail=(slots["reserved"] + slots["rounding"]) * token,
            cached=0,
            padding=0,
            free=slots["outside"] * token,
            pages_total=self._tokens,
            pages_used=self.usage()[0],
            pages_cached=0,
            pages_shared=0,
        )

    def bill(self, seq: str) -> dict[str, int]:
        chunk, token = self._chunks[seq], self.groups[0].page_bytes
        return {
            "tokens": chunk.length * token,
            "tail": (chunk.reserved - chunk.length) * token,
            "padding": 0,
            "shared": 0,
        }

    def check(self) -> None:
        taken = [False] * self._tokens
        for chunk in self._chunks.values():
            assert chunk.length <= chunk.reserved
            size = 1 << _Buddy.order(chunk.reserved)
            assert not any(taken[chunk.at : chunk.at + size]), "reservations overlap"
            taken[chunk.at : chunk.at + size] = [True] * size
