"""What is cached, by the hash of a block of tokens and everything before it: the small pages that hold the block in
every table.

A block of one layer type is whole when all its pages are there: several if the type has several tables or finer
pages. Pages of a block that has lost one are of no use and are given up together (Jenga: aligned
eviction).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

NONE = -1


class Block:
    """pages: one per column, NONE where none is cached. whole: bit per type whose pages are all there. mark: what
    sequences have had here, of the cache's classes; 0: nothing."""

    __slots__ = ("key", "mark", "pages", "whole")

    def __init__(self, key: bytes, columns: int) -> None:
        self.key = key
        self.pages = [NONE] * columns
        self.whole = 0
        self.mark = 0


class PrefixIndex:
    """types: per layer type, its columns: pages of a block, over all the type's tables. num_pages: that there are
    to be named."""

    def __init__(self, types: Sequence[range], num_pages: int) -> None:
        self.types = tuple(types)
        self._columns = sum(map(len, types))
        self._type_of = [t for t, columns in enumerate(types) for _ in columns]
        self._blocks: dict[bytes, Block] = {}
        self._block_of: list[Block | None] = [None] * num_pages
        self._column_of = [0] * num_pages
        self._count = 0
        self.get = self._blocks.get  # key -> Block | None

    def __len__(self) -> int:
        return self._count

    def __contains__(self, page: int) -> bool:
        return self._block_of[page] is not None

    def find(self, key: bytes, column: int) -> int:
        block = self._blocks.get(key)
        return NONE if block is None else block.pages[column]

    def name_of(self, page: int) -> tuple[bytes, int]:
        """Key and column."""
        block = self._block_of[page]
        assert block is not None
        return block.key, self._column_of[page]

    def pages(self) -> Iterator[int]:
        return (page for page, block in enumerate(self._block_of) if block is not None)

    def add(self, key: bytes, column: int, page: int) -> None:
        """`page` holds this block in this column, which has had none."""
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Block(key, self._columns)
        assert block.pages[column] == NONE and self._block_of[page] is None
        block.pages[column] = page
        self._block_of[page], self._column_of[page] = block, column
        self._count += 1
        kind = self._type_of[column]
        columns = self.types[kind]
        if NONE not in block.pages[columns.start : columns.stop]:
            block.whole |= 1 << kind

    def add_fresh(self, key: bytes, pages: list[int], whole: int) -> bool:
        """A block that is not known yet, all its pages at once, unless one of them has a name. pages: one per
        column, which is kept; whole: of which types they are all given. Returns whether it was done."""
        if key in self._blocks:
            return False
        names, count = self._block_of, 0
        for page in pages:
            if page >= 0:
                if names[page] is not None:
                    return False
                count += 1
        if not count:
            return False
        block = Block(key, 0)
        block.pages, block.whole = pages, whole
        self._blocks[key] = block
        columns = self._column_of
        for column, page in enumerate(pages):
            if page >= 0:
                names[page] = block
                columns[page] = column
        self._count += count
        return True

    def drop(self, page: int) -> list[int]:
        """Forget a page. Returns the other pages of its block and type, of no use without it, still known."""
        block, column = self._block_of[page], self._column_of[page]
        assert block is not None
        self._block_of[page] = None
        self._count -= 1
        kind, pages = self._type_of[column], block.pages
        pages[column] = NONE
        block.whole &= ~(1 << kind)
        columns = self.types[kind]
        others = [p for p in pages[columns.start : columns.stop] if p != NONE]
        if not others and all(p == NONE for p in pages):
            del self._blocks[block.key]
        return others

    def clear(self) -> None:
        self._blocks.clear()
        self._block_of = [None] * len(self._block_of)
        self._count = 0

    def check(self) -> None:
        names = {page: self.name_of(page) for page in self.pages()}
        assert len(names) == self._count
        for key, block in self._blocks.items():
            assert block.key == key and any(page != NONE for page in block.pages), "an empty block"
            for column, page in enumerate(block.pages):
                assert page == NONE or names[page] == (key, column), "name and block agree"
            whole = [all(block.pages[c] != NONE for c in columns) for columns in self.types]
            assert block.whole == sum(1 << t for t, yes in enumerate(whole) if yes), "whole types"
        assert all(self._blocks[key].pages[c] == page for page, (key, c) in names.items())
