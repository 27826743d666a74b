"""Prefixes that stay in the arena after their requests: a chain of segments, least recently used first to go.

Bytes, not pages: a segment costs what its tokens take of the layers that keep everything, and, where it ends a
message, the windows and states without which nothing could go on from there. A segment that running requests hold
is theirs; only what makes it usable later is the cache's.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from llmtool.memprofile.demand import Demand
from llmtool.memprofile.requests import Segment

Floats = npt.NDArray[np.float64]


class _Node:
    __slots__ = ("depth", "extra", "full", "refs", "usable", "used")

    def __init__(self, depth: int, full: Floats, extra: Floats, usable: bool) -> None:
        self.depth = depth
        self.full = full
        self.extra = extra
        self.usable = usable
        self.refs = 0
        self.used = 0


class Prefixes:
    """cached: bytes per partition that may be given up. saved: bytes that running requests share."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._nodes: dict[int, _Node] = {}
        self._lru: list[tuple[int, int, int]] = []  # last use, -depth, key: a parent outlives its children
        self._states = bool(demand.state.any())
        self.cached = np.zeros(len(demand.capacity))
        self.saved = np.zeros(len(demand.capacity))

    def match(self, segments: tuple[Segment, ...]) -> int:
        """How many segments are there, up to the last that can be gone on from."""
        found = 0
        for i, segment in enumerate(segments):
            node = self._nodes.get(segment.key)
            if node is None:
                break
            if node.usable:
                found = i + 1
        return found

    def unused(self, segments: tuple[Segment, ...]) -> Floats:
        """Bytes of cached segments that would be a request's, and so could not be given up for it."""
        parts = [self._nodes[s.key].full for s in segments if self._nodes[s.key].refs == 0]
        return np.sum(parts, axis=0) if parts else np.zeros(len(self.cached))

    def shared(self, segments: tuple[Segment, ...]) -> Floats:
        """Bytes that a request need not have of its own because another running one has them."""
        parts = [self._nodes[s.key].full for s in segments if self._nodes[s.key].refs > 0]
        return np.sum(parts, axis=0) if parts else np.zeros(len(self.cached))

    def hold(self, segments: tuple[Segment, ...], now: int) -> None:
        """A request computes or takes over these segments."""
        depth = 0
        for segment in segments:
            depth += segment.tokens
            node = self._nodes.get(segment.key)
            if node is None:
                node = self._add(segment, depth)
                self.cached += node.extra
            elif node.refs:
                self.saved += node.full
            else:
                self.cached -= node.full
            node.refs += 1
            node.used = now

    def _add(self, segment: Segment, depth: int) -> _Node:
        d = self._demand
        extra = d.window * min(segment.tokens, d.window_tokens)
        if segment.checkpoint:
            extra = extra + d.state
        usable = segment.checkpoint or not self._states
        node = self._nodes[segment.key] = _Node(depth, d.share * segment.tokens, extra, usable)
        return node

    def release(self, segments: tuple[Segment, ...], now: int, answer: Segment | None = None) -> None:
        """A request ends or is preempted. answer: what it said, which stays too."""
        depth = 0
        for segment in segments:
            node = self._nodes[segment.key]
            depth += segment.tokens
            node.refs -= 1
            node.used = now
            if node.refs:
                self.saved -= node.full
            else:
                self.cached += node.full
                heappush(self._lru, (now, -depth, segment.key))
        if answer is not None and answer.key not in self._nodes:
            node = self._add(answer, depth + answer.tokens)
            node.used = now
            self.cached += node.full + node.extra
            heappush(self._lru, (now, -node.depth, answer.key))

    def shrink(self, room: Floats) -> None:
        """Give up the least recently used until what is cached fits `room` bytes in every partition."""
        while (self.cached > room + 1e-6).any() and self._lru:
            used, depth, key = heappop(self._lru)
            node = self._nodes.get(key)
            if node is None or node.refs or (node.used, -node.depth) != (used, depth):
                continue
            self.cached -= node.full + node.extra
            del self._nodes[key]
