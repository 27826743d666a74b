"""Prefixes that stay in the arena after their requests: a chain of segments, least recently used first to go.

Bytes, not pages: a segment costs what its tokens take of the layers that keep everything, and, where it ends a
message, the windows and states without which nothing could go on from there. A segment that running requests hold
is theirs, and its windows too while those requests are shorter than the window; the rest is the cache's.
"""

from __future__ import annotations

from heapq import heappop, heappush

from llmtool.memprofile.demand import Demand, Floats
from llmtool.memprofile.requests import Segment


class _Node:
    """refs: running requests that hold it; inside: those of them that are shorter than the window, and so hold its
    windows too. reach: of its tokens, those in the window of what comes next."""

    __slots__ = ("depth", "inside", "reach", "refs", "state", "tokens", "usable", "used")

    def __init__(self, tokens: int, depth: int, reach: int, state: bool, usable: bool) -> None:
        self.tokens = tokens
        self.depth = depth
        self.reach = reach
        self.state = state
        self.usable = usable
        self.refs = self.inside = self.used = 0


class Prefixes:
    """Counts tokens; `cached` and `saved` turn them into bytes of each partition."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._nodes: dict[int, _Node] = {}
        self._lru: list[tuple[int, int, int]] = []  # last use, -depth, key: a parent outlives its children
        self._states = bool(demand.state.any())
        # Tokens, tokens in windows and states that no running request answers for; tokens, and tokens in windows,
        # that running requests count more than once.
        self._full = self._windows = self._checkpoints = 0
        self._twice = self._twice_windows = 0

    @property
    def cached(self) -> Floats:
        """Bytes that may be given up."""
        d = self._demand
        return d.share * self._full + d.window * self._windows + d.state * float(self._checkpoints)

    @property
    def saved(self) -> Floats:
        """Bytes that running requests share."""
        return self._demand.share * self._twice + self._demand.window * self._twice_windows

    def inside(self, length: int) -> bool:
        """Whether a request of `length` tokens in all never leaves the window."""
        return length <= self._demand.window_tokens

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

    def shared(self, segments: tuple[Segment, ...], inside: bool) -> Floats:
        """Bytes that a request need not have of its own because another running one has them."""
        nodes = [self._nodes[s.key] for s in segments]
        full = sum(node.tokens for node in nodes if node.refs)
        windows = sum(node.reach for node in nodes if node.inside) if inside else 0
        return self._demand.share * full + self._demand.window * windows

    def hold(self, segments: tuple[Segment, ...], now: int, inside: bool) -> None:
        """A request computes or takes over these segments."""
        depth = 0
        for segment in segments:
            depth += segment.tokens
            node = self._nodes.get(segment.key) or self._add(segment, depth)
            node.used = now
            if node.refs:
                self._twice += node.tokens
            else:
                self._full -= node.tokens
            node.refs += 1
            if inside:
                if node.inside:
                    self._twice_windows += node.reach
                else:
                    self._windows -= node.reach
                node.inside += 1

    def _add(self, segment: Segment, depth: int) -> _Node:
        usable = segment.checkpoint or not self._states
        reach = min(segment.tokens, self._demand.window_tokens)
        node = _Node(segment.tokens, depth, reach, segment.checkpoint, usable)
        self._nodes[segment.key] = node
        self._full += node.tokens
        self._windows += reach
        self._checkpoints += segment.checkpoint
        return node

    def release(
        self, segments: tuple[Segment, ...], now: int, inside: bool, answer: Segment | None = None
    ) -> None:
        """A request ends or is preempted. answer: what it said, which stays too."""
        depth = 0
        for segment in segments:
            node = self._nodes[segment.key]
            depth += segment.tokens
            node.used = now
            node.refs -= 1
            if node.refs:
                self._twice -= node.tokens
            else:
                self._full += node.tokens
                heappush(self._lru, (now, -depth, segment.key))
            if inside:
                node.inside -= 1
                if node.inside:
                    self._twice_windows -= node.reach
                else:
                    self._windows += node.reach
        if answer is not None and answer.key not in self._nodes:
            node = self._add(answer, depth + answer.tokens)
            node.used = now
            heappush(self._lru, (now, -node.depth, answer.key))

    def shrink(self, room: Floats) -> None:
        """Give up the least recently used until what is cached fits `room` bytes in every partition."""
        over = (self.cached - room).tolist()
        rates = list(
            zip(
                *(x.tolist() for x in (self._demand.share, self._demand.window, self._demand.state)),
                strict=True,
            )
        )
        while self._lru and max(over) > 1e-3:
            used, depth, key = heappop(self._lru)
            node = self._nodes.get(key)
            if node is None or node.refs or (node.used, -node.depth) != (used, depth):
                continue
            self._full -= node.tokens
            self._windows -= node.reach
            self._checkpoints -= node.state
            for i, (full, window, state) in enumerate(rates):
                over[i] -= full * node.tokens + window * node.reach + state * node.state
            del self._nodes[key]
