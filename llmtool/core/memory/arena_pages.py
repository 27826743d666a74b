"""What the arena is told, and what it hands out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SmallPages:
    """One layer type's small pages. stride: bytes between them, a multiple of UNIT; per_large: how many fit."""

    name: str
    stride: int
    per_large: int


@dataclass(frozen=True, slots=True)
class Taken:
    """pages: per type, in the order asked for. evicted: pages whose content is gone, which may be among `pages`."""

    pages: tuple[tuple[int, ...], ...]
    evicted: tuple[int, ...]
