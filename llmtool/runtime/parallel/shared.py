"""Sums of a stage whose ranks are processes of one machine's CPUs, in memory that they share.

A decoding step sums twice a layer, a few kilobytes each: through sockets that takes longer than the layer. Here a
rank writes its part, counts up its flag, waits until all flags are there, and adds all parts up, in the order of
ranks: the same bits on each. Two buffers in turn need no second wait: who writes the next but one sum has seen
everyone begin the next, and so finish reading this one.
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llmtool.models.part import Peers

SHM = Path("/dev/shm")
LINE = 64  # bytes between flags: each in a cache line of its own
MOST = 4 * 2**20  # bytes of a sum; larger ones are worth the sockets
ROOM = 32 * 2**20  # bytes of all buffers together: containers have 64 MiB
PATIENT = 0.002  # seconds of spinning before sleeping between looks
LOOK = 0.05  # seconds between looks at whether the others are alive


class SharedPeers:
    """`Peers` with sums in shared memory; the rest, and sums that are too large, as `others` do them.

    memory: at least `size_of(size)` zeros. seconds: how long to wait for a rank. health: raises where one is gone.
    """

    def __init__(
        self,
        others: Peers,
        memory: mmap.mmap,
        rank: int,
        size: int,
        seconds: float,
        health: Callable[[], None] | None = None,
    ) -> None:
        self._others, self._rank, self._seconds = others, rank, seconds
        self.health = health
        self._most = most_bytes(size)
        self._flags = np.frombuffer(memory, np.int64, size * LINE // 8)[:: LINE // 8]
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=size * LINE)
        self._data = data[: 2 * size * self._most].view(2, size, self._most)
        self._count = 0

    def sum(self, x: Tensor) -> Tensor:
        if x.nbytes > self._most:
            return self._others.sum(x)
        x = x.contiguous()
        flat = x.view(-1)
        self._count += 1
        parts = self._data[self._count % 2, :, : x.nbytes].view(x.dtype)  # [ranks, elements]
        parts[self._rank].copy_(flat)
        # x86 keeps the order of stores: who sees the flag sees what was written before it.
        self._flags[self._rank] = self._count
        self._wait()
        torch.add(parts[0], parts[1], out=flat)
        for part in parts[2:]:
            flat += part
        return x

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self._others.gather(x, counts)

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._others.exchange(x, send, receive)

    def _wait(self) -> None:
        if self._flags.min() >= self._count:
            return
        started = looked = time.monotonic()
        while self._flags.min() < self._count:
            now = time.monotonic()
            if now - started < PATIENT:
                os.sched_yield()
                continue
            time.sleep(2e-5)
            if now - looked > LOOK:
                looked = now
                if self.health is not None:
                    self.health()
                if now - started > self._seconds:
                    late = np.flatnonzero(self._flags < self._count).tolist()
                    raise RuntimeError(
                        f"timed out after {self._seconds:g} s: no sum from part {late} of the stage"
                    )


def most_bytes(size: int) -> int:
    """The largest sum of so many ranks."""
    return min(MOST, ROOM // (2 * size) // LINE * LINE)


def size_of(size: int) -> int:
    """Bytes of memory that so many ranks share."""
    return size * LINE + 2 * size * most_bytes(size)


def share(
    others: Peers,
    group: dist.ProcessGroup,
    store: dist.Store,
    name: str,
    rank: int,
    size: int,
    seconds: float,
) -> Peers:
    """Peers with shared sums for ranks of one machine's CPUs, or `others` where that cannot be. Every rank of
    `group` calls it. name: of the stage, for the store."""
    if size == 1 or platform.machine() not in ("x86_64", "AMD64"):
        return others
    path = ""
    if rank == 0:
        path = _make(size_of(size))
        store.set(name, path)
    else:
        path = store.get(name).decode()
    memory = _map(path, size_of(size))
    # All of them, or none: and then the file has no name any more, and goes with its last process.
    missing = torch.tensor([memory is None], dtype=torch.int32)
    dist.all_reduce(missing, group=group)
    if rank == 0 and path:
        Path(path).unlink(missing_ok=True)
    if memory is None or int(missing):
        return others
    return SharedPeers(others, memory, rank, size, seconds)


def _make(nbytes: int) -> str:
    """A new file of zeros in memory; "" where there is no room for one."""
    try:
        handle, path = tempfile.mkstemp(prefix="llmtool-", dir=SHM)
    except OSError:
        return ""
    try:
        os.posix_fallocate(handle, 0, nbytes)  # a full memory is an error here, and would be a signal later
    except OSError:
        Path(path).unlink(missing_ok=True)
        return ""
    finally:
        os.close(handle)
    return path


def _map(path: str, nbytes: int) -> mmap.mmap | None:
    if not path:
        return None
    try:
        with Path(path).open("r+b") as file:
            return mmap.mmap(file.fileno(), nbytes)
    except (OSError, ValueError):
        return None
