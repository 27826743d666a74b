"""Processes that work for this one, and whether they, and the ranks elsewhere, are alive.

A rank that dies closes its connections, and whoever talks to it hears of it at once. One that hangs is known by its
heartbeat: every rank counts up a number in the store. Nobody outlives rank 0: the system kills its children with
it, and ranks elsewhere miss its heartbeat or its store.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from llmtool.config import EngineConfig
from llmtool.errors import EngineDead, LLMToolError
from llmtool.runtime.parallel.rendezvous import dump_error, load_error, reach

BEAT = 0.5  # seconds
MODULE = "llmtool.runtime.parallel.worker"


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told when it starts. directory: of the model."""

    config: EngineConfig
    rank: int
    directory: Path
    address: str
    port: int
    parent: int


class Workers:
    """The processes of ranks on this machine, started by this one."""

    def __init__(self, ranks: Sequence[int], order: Order) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in ranks:
            process = subprocess.Popen([sys.executable, "-m", MODULE], stdin=subprocess.PIPE)
            self.processes[rank] = process
            assert process.stdin is not None
            mine = Order(order.config, rank, order.directory, order.address, order.port, os.getpid())
            with suppress(BrokenPipeError):  # it is dead already, which `ended` will say
                pickle.dump(mine, process.stdin)
                process.stdin.close()

    def ended(self) -> tuple[int, int] | None:
        """(rank, exit code) of one that has ended; of several, of one that was killed: the others miss it."""
        codes = {rank: process.poll() for rank, process in self.processes.items()}
        ended = [(rank, code) for rank, code in codes.items() if code is not None]
        return min(ended, key=lambda end: (end[1] >= 0, end[0]), default=None)

    def kill(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.kill()
        for process in self.processes.values():
            process.wait()

    def join(self, seconds: float) -> None:
        """Until all have ended; those that have not by then are killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()


class Watch:
    """Rank 0's eye on all others, in a thread. What it finds is `failure`, and then no worker is left here, so that
    whoever waits for one hears that it is gone."""

    def __init__(self, workers: Workers, world: int, address: str, port: int, config: EngineConfig) -> None:
        self.failure: LLMToolError | None = None
        self._workers, self._world = workers, world
        self._seconds = config.distributed_timeout_seconds
        self._store = reach(address, port, config)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmtool-watch", daemon=True)
        self._thread.start()

    def health(self) -> None:
        """Raises EngineDead where a rank is gone."""
        if self.failure is not None:
            raise self.failure

    def why(self, seconds: float) -> LLMToolError | None:
        """What has gone wrong, as far as is known after so long."""
        deadline = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.05)
        return self.failure

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)

    def _run(self) -> None:
        beats: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._over.wait(BEAT if self._workers.ended() is None else 0):
            count += 1
            try:
                self._store.set("beat/0", str(count))
                failure = self._ended() or self._said() or self._late(beats)
            except RuntimeError as error:
                failure = EngineDead(f"The ranks' store is gone: {error}.")
            if failure is not None and not self._over.is_set():
                self.failure = failure
                self._workers.kill()
                return

    def _ended(self) -> LLMToolError | None:
        ended = self._workers.ended()
        if ended is None:
            return None
        rank, code = ended
        said = self._said()
        if said is not None:
            return said
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        pid = self._workers.processes[rank].pid
        return EngineDead(
            f"Rank {rank} of {self._world} (process {pid}) {how}.", "Restart the server; see its log."
        )

    def _said(self) -> LLMToolError | None:
        """What a rank said before it ended."""
        for rank in range(1, self._world):
            if self._store.check([f"error/{rank}"]):
                return load_error(self._store.get(f"error/{rank}"))
        return None

    def _late(self, beats: dict[int, tuple[bytes, float]]) -> LLMToolError | None:
        now = time.monotonic()
        for rank in range(1, self._world):
            if not self._store.check([f"beat/{rank}"]):
                continue
            beat = self._store.get(f"beat/{rank}")
            if rank not in beats or beats[rank][0] != beat:
                beats[rank] = beat, now
            elif now - beats[rank][1] > self._seconds:
                return EngineDead(
                    f"Rank {rank} of {self._world} has not been heard of for {self._seconds:g} s: its process "
                    f"hangs, or its machine is gone.",
                    "Restart the server; --distributed-timeout-seconds says how long to wait.",
                )
        return None


def beat(rank: int, address: str, port: int, config: EngineConfig) -> None:
    """A worker's heart, in a thread; it ends the process when rank 0's has stopped."""
    store = reach(address, port, config)

    def run() -> None:
        count, last, since = 0, b"", time.monotonic()
        try:
            while True:
                count += 1
                store.set(f"beat/{rank}", str(count))
                seen = store.get("beat/0") if store.check(["beat/0"]) else b""
                if seen != last:
                    last, since = seen, time.monotonic()
                elif time.monotonic() - since > config.distributed_timeout_seconds:
                    _end(f"Rank {rank}: rank 0 has not been heard of for {time.monotonic() - since:.0f} s.")
                time.sleep(BEAT)
        except (RuntimeError, OSError):
            time.sleep(
                2 * BEAT
            )  # an orderly end closes the store too: this process may be about to end as well
            _end(f"Rank {rank}: rank 0 is gone.")

    threading.Thread(target=run, name="llmtool-heart", daemon=True).start()


def _end(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    os._exit(1)


def publish(store: dist.TCPStore, rank: int, error: LLMToolError) -> None:
    """For rank 0 to read, as the reason why this one ends."""
    with suppress(RuntimeError):
        store.set(f"error/{rank}", dump_error(error))
