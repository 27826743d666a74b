"""One contender's processes: started, watched (memory and CPU time of the whole tree) and ended.

Linux only: everything is read from /proc.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")  # of /proc's CPU times, per second
PAGE = os.sysconf("SC_PAGE_SIZE")
PERIOD = 0.5  # seconds between two looks at the tree's memory
_FRAMES = re.compile("[\u2500-\u257f]+")
GRACE = 30.0  # seconds from SIGTERM to SIGKILL


def tree(root: int) -> list[int]:
    """`root` and its descendants that live, also those that left its session."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
    return found


def rss(pids: Sequence[int]) -> int:
    """Resident bytes, summed: pages that two of them share count twice, so this is an upper bound."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        except (OSError, IndexError):
            continue
    return total


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time used so far, with that of children that ended and were waited for."""
    total = 0
    for pid in pids:
        try:
            # The name is in brackets and may hold spaces: count from its end. Fields 14-17 of proc(5).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
        except (OSError, ValueError):
            continue
    return total / TICK


def _born(pid: int) -> str | None:
    """The start time of a live process, which tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class MachineTimes:
    """CPU seconds of all cores since boot. stolen: taken by the host while there was work to do."""

    busy: float
    stolen: float
    wall: float

    @staticmethod
    def now() -> MachineTimes:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
        return MachineTimes((user + nice + system + irq + softirq) / TICK, steal / TICK, time.perf_counter())


class Contention:
    """What others took of the machine while something was measured.

    `with Contention(pids) as c: ...; c.foreign` is the CPU time of everything that is neither under `pids` nor this
    process, as a part of all cores' time; `c.stolen` is what the host took.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self.foreign = self.stolen = 0.0

    def _own(self) -> float:
        return cpu_seconds(tree(self._root)) + cpu_seconds([os.getpid()])

    def __enter__(self) -> Contention:
        self._before, self._used = MachineTimes.now(), self._own()
        return self

    def __exit__(self, *error: object) -> None:
        after, used = MachineTimes.now(), self._own() - self._used
        room = (after.wall - self._before.wall) * len(os.sched_getaffinity(0))
        if room > 0:
            self.foreign = max(0.0, after.busy - self._before.busy - used) / room
            self.stolen = (after.stolen - self._before.stolen) / room


class Process:
    """A contender's command in a session of its own. `with Process(...) as p:` ends it and all it started."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, pipes: bool = False
    ) -> None:
        """pipes: stdin and stdout are the caller's (a driver's protocol); else both outputs go to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._file = log.open("w")
        self.started = time.perf_counter()
        self.popen = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else self._file,
            stderr=self._file,
            text=True,
            start_new_session=True,
        )
        self.peak_rss = 0
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self._watch.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def tail(self, lines: int = 5) -> str:
        """The last lines of its log, without frames drawn around them, for an error message."""
        bare = (_FRAMES.sub(" ", line).strip() for line in self.log.read_text(errors="replace").splitlines())
        return " | ".join([line for line in bare if line][-lines:])[-1500:]

    def _sample(self) -> None:
        while not self._ended.wait(PERIOD):
            self.peak_rss = max(self.peak_rss, rss(tree(self.pid)))

    def stop(self) -> None:
        self._ended.set()
        self._watch.join()
        descendants = [(pid, _born(pid)) for pid in tree(self.pid)]
        if self.alive:
            self.popen.terminate()
            try:
                self.popen.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        self.popen.wait()
        for pid, born in descendants:  # workers that outlived it would disturb whoever is measured next
            if born is not None and _born(pid) == born:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()
        self._file.close()
