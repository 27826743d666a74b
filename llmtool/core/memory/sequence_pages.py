"""What the two-level allocator remembers of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmtool.core.memory.prefix_index import NONE


class SequencePages:
    """Tables and hash chain of one sequence. An entry of a table is a small page, NONE where it was given up."""

    __slots__ = (
        *("cow", "dear", "first", "hashes", "hit", "host", "keep", "known", "left"),
        *("length", "names", "parted", "prompt", "registered", "returned", "rolling", "room", "root"),
        *("stale", "superseded", "tables", "token_ids"),
    )

    def __init__(self, token_ids: Sequence[int], root: bytes, tables: int) -> None:
        self.token_ids = token_ids
        self.prompt = len(token_ids)  # tokens known when it began
        self.root = root
        self.hashes: list[bytes] = []  # of leading blocks, perhaps more than are computed
        self.registered = 0  # blocks offered to the prefix cache
        self.hit = 0  # blocks taken over from it
        self.parted = 0  # blocks of it that were known, whether usable or not
        self.returned = False  # what follows them was cached, and is evicted
        self.tables: list[list[int]] = [[] for _ in range(tables)]
        self.first = [0] * tables  # entries before it are given up
        self.length = 0  # positions that may be written
        self.known = 0  # positions written by submitted steps
        self.room = 0  # growing up to here changes nothing
        self.cow = False  # a partly filled page may be shared: look before writing
        self.keep: frozenset[int] = frozenset()  # boundaries, in blocks, whose states are kept
        self.dear: frozenset[int] = frozenset()  # those of them that others may well share
        self.names: list[tuple[int, int, int]] = []  # (block, column, page) of states to be named
        self.rolling = -1  # the block whose state was named last
        self.superseded: list[int] = []  # those named before it, to be looked at
        self.left: list[tuple[int, int]] = []  # page, block: given up, and needed at a prompt's points
        self.stale: list[int] = []  # pages copied from, to be released
        self.host: list[list[int]] | None = None  # small pages of the host's arena, per table

    def held(self) -> Iterator[int]:
        """Every page that the sequence holds, as often as it holds it."""
        for table, first in zip(self.tables, self.first, strict=True):
            last = NONE
            for page in table[first:]:
                if page != last:
                    yield page
                last = page
        yield from self.stale
