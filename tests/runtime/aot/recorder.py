"""A runtime that captures on a CPU: it keeps what was launched and what waits for what, and replays in any order
that this leaves open."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from llmtool.runtime.aot.tasks import Edge
from tests.runtime.aot.graphs import linear_extension


class FakeRuntime:
    """memory: launches before it is out of memory; None for no end."""

    def __init__(self, seed: int = 0, memory: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.memory = memory
        self.work: list[Callable[[], None]] = []
        self.edges: set[Edge] = set()
        self.waits = 0
        self.aborted = False
        self._tail: dict[int, set[int]] = {}  # stream -> what its next launch comes after
        self._in: set[int] = set()

    def begin(self, streams: int) -> None:
        self.streams = streams
        self._in = {0}

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self._in, "a stream that takes no part in the capture"
        assert stream < self.streams
        if self.memory is not None and len(self.work) >= self.memory:
            raise torch.OutOfMemoryError("no bytes left")
        i = len(self.work)
        self.edges |= {(u, i) for u in self._tail.get(stream, ())}
        self._tail[stream] = {i}
        self.work.append(work)
        work()

    def record(self, stream: int) -> frozenset[int]:
        assert stream in self._in
        return frozenset(self._tail.get(stream, ()))

    def wait(self, stream: int, event: frozenset[int]) -> None:
        self._in.add(stream)
        self._tail.setdefault(stream, set()).update(event)
        self.waits += bool(event)

    def end(self) -> Callable[[], None]:
        def replay() -> None:
            for i in linear_extension(self.rng, len(self.work), sorted(self.edges)):
                self.work[i]()

        return replay

    def abort(self) -> None:
        self.aborted = True
