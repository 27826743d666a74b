"""Ranks as threads of one process: what a stage sums and exchanges, without processes or sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(slots=True)
class Room:
    """Where the ranks of a stage meet: each puts something in its place, all look, all leave."""

    size: int
    places: list[object] = field(default_factory=list)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.places = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=60)

    def meet(self, rank: int, gives: object, takes: Callable[[list[object]], T]) -> T:
        self.places[rank] = gives
        self.barrier.wait()
        taken = takes(self.places)
        self.barrier.wait()
        return taken


@dataclass(frozen=True, slots=True)
class ThreadPeers:
    room: Room
    rank: int

    def sum(self, x: Tensor) -> Tensor:
        def total(parts: list[object]) -> Tensor:
            first, *rest = parts
            assert isinstance(first, Tensor)
            out = first.clone()
            for part in rest:
                assert isinstance(part, Tensor) and part.shape == out.shape and part.dtype == out.dtype
                out += part
            return out

        return x.copy_(self.room.meet(self.rank, x.clone(), total))

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(x) == counts[self.rank]
        return self.room.meet(self.rank, x.clone(), lambda parts: torch.cat(parts))  # type: ignore[arg-type]

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        given = x.split(list(send))

        def mine(parts: list[object]) -> Tensor:
            pieces = [part[self.rank] for part in parts]  # type: ignore[index]
            assert [len(piece) for piece in pieces] == list(receive)
            return torch.cat(pieces)

        return self.room.meet(self.rank, [piece.clone() for piece in given], mine)


def together(size: int, work: Callable[[ThreadPeers], T]) -> list[T]:
    """What `work` returns on each of so many ranks."""
    room = Room(size)

    def run(rank: int) -> T:
        try:
            with torch.inference_mode():
                return work(ThreadPeers(room, rank))
        except BaseException:
            room.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for f in futures if (error := f.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [f.result() for f in futures]
