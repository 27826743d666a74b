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
    """pages: one per column, NONE where none is cached. whole: bit per type whose pages are all there."""

    __slots__ = ("pages", "whole")

    def __init__(self, columns: int) -> None:
        self.pages = [NONE] * columns
        self.whole = 0


class PrefixIndex:
    """types: per layer type, its columns: pages of a block, over all the type's tables."""

    def __init__(self, types: Sequence[range]) -> None:
        self._types = tuple(types)
        self._type_of = [t for t, columns in enumerate(types) for _ in columns]
        self._blocks: dict[bytes, Block] = {}
        self._name: dict[int, tuple[bytes, int]] = {}  # page -> key, column

    def __len__(self) -> int:
        return len(self._name)

    def __contains__(self, page: int) -> bool:
        return page in self._name

    def get(self, key: bytes) -> Block | None:
        return self._blocks.get(key)

    def find(self, key: bytes, column: int) -> int:
        block = self._blocks.get(key)
        return NONE if block is None else block.pages[column]

    def name_of(self, page: int) -> tuple[bytes, int]:
        """Key and column."""
        return self._name[page]

    def pages(self) -> Iterator[int]:
        return iter(self._name)

    def add(self, key: bytes, column: int, page: int) -> None:
        """`page` holds this block in this column, which has had none."""
        assert page not in self._name
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Block(len(self._type_of))
        assert block.pages[column] == NONE
        block.pages[column] = page
        self._name[page] = (key, column)
        kind = self._type_of[column]
        pages = block.pages
        if all(pages[c] != NONE for c in self._types[kind]):
            block.whole |= 1 << kind

    def drop(self, page: int) -> list[int]:
        """Forget a page. Returns the other pages of its block and type, of no use without it, still known."""
        key, column = self._name.pop(page)
        block = self._blocks[key]
        kind = self._type_of[column]
        block.pages[column] = NONE
        block.whole &= ~(1 << kind)
        others = [block.pages[c] for c in self._types[kind] if block.pages[c] != NONE]
        if not others and all(p == NONE for p in block.pages):
            del self._blocks[key]
        return others

    def clear(self) -> None:
        self._blocks.clear()
        self._name.clear()

    def check(self) -> None:
        for key, block in self._blocks.items():
            assert any(page != NONE for page in block.pages), "an empty block"
            for column, page in enumerate(block.pages):
                assert page == NONE or self._name[page] == (key, column), "name and block agree"
            whole = [all(block.pages[c] != NONE for c in columns) for columns in self._types]
            assert block.whole == sum(1 << t for t, yes in enumerate(whole) if yes), "whole types"
        assert all(self._blocks[key].pages[c] == page for page, (key, c) in self._name.items())
