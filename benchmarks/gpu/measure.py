"""Timing on a CUDA device by graph replays, and what is written beside the figures."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "h200"
Run = Callable[[], object]


@dataclass(slots=True)
class Budget:
    """Seconds this run may take; what no longer fits is listed as left out, never silently dropped."""

    seconds: float
    left_out: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def allows(self, what: str, seconds: float) -> bool:
        if self.left >= seconds:
            return True
        self.left_out.append(what)
        return False


def median_seconds(runs: Sequence[Run], device: torch.device, repeats: int = 20) -> float:
    """Seconds of one of `runs`, which do the same over different data so that no cache holds it.

    On CUDA all of them are captured in one graph, so that launching costs nothing; the median of its replays.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - started) / len(runs)
    graph = captured(lambda: [run() for run in runs])
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times) / len(runs)


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and plans, which a capture must not
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds([lambda: target.copy_(source)], device)


def attempt(run: Callable[[], float]) -> float | str:
    """Its figure, or why there is none: a peer that fails is a result too."""
    try:
        return run()
    except Exception as e:
        return reason(e)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def synchronized(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def save(name: str, data: dict[str, Any], directory: Path) -> None:
    from llmtool.bench.environment import hardware, versions

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    about = {"date": datetime.now(UTC).date().isoformat(), **versions(), "hardware": hardware(gpu)}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({**data, "machine": about}, indent=1) + "\n")
    sys.stderr.write(f"wrote {path}\n")


def table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, aligned, to stdout."""
    print(f"\n{title}")
    keys = list(rows[0]) if rows else []
    cells = [[_shown(row.get(key)) for key in keys] for row in rows]
    widths = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(keys)]
    for line in [keys, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)[:60]
