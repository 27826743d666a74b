"""What is measured, one JSON line a cell (round, contender, mode), written as soon as it is known.

A run that was cut goes on at the first cell that is missing. Cells belong to a run: the same requests, the same
checkpoint, the same llmtool code. Whatever differs starts a new run, and the old cells stay in the file unused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import REPOSITORY


def code_fingerprint() -> str:
    """Of everything that llmtool runs: its Python and its kernels."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in ("llmtool", "kernels"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Cell:
    """metrics: by name, empty where `error` says why there are none. foreign, stolen: see process.Contention.
    seconds: how long it took. probe: the machine's figures before this contender was started.
    """

    run: str
    round: int
    contender: str
    mode: str
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    foreign: float = 0.0
    stolen: float = 0.0
    probe: dict[str, float] = field(default_factory=dict)
    at: str = ""


class Store:
    """The cells of one run in a file that only grows. The last of equal cells counts: errors are tried again."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self._cells: dict[tuple[int, str, str], Cell] = {}
        for cell in _read(path):
            if cell.run == run:
                self._cells[cell.round, cell.contender, cell.mode] = cell

    def add(self, cell: Cell) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cell = Cell(**asdict(cell) | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
        with self.path.open("a+b") as file:
            # After a line that was cut, a new one is begun.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(asdict(cell)).encode() + b"\n")
        self._cells[cell.round, cell.contender, cell.mode] = cell

    def done(self, round: int, contender: str, mode: str) -> bool:
        cell = self._cells.get((round, contender, mode))
        return cell is not None and not cell.error

    def cells(self, contender: str | None = None, mode: str | None = None) -> list[Cell]:
        """In order of rounds; those that failed are among them."""
        chosen = [
            c for c in self._cells.values() if contender in (None, c.contender) and mode in (None, c.mode)
        ]
        return sorted(chosen, key=lambda c: c.round)

    def values(self, contender: str, mode: str, metric: str) -> dict[int, float]:
        """The metric by round, of the cells that succeeded."""
        cells = self.cells(contender, mode)
        return {c.round: float(c.metrics[metric]) for c in cells if not c.error and metric in c.metrics}


def _read(path: Path) -> Iterator[Cell]:
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            try:
                yield Cell(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the last line of a run that was cut
