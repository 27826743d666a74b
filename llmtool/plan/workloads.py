"""Workloads by name, from published statistics, and from traces; arrivals by rate or by a number of clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtool.errors import LLMToolError, UsageError
from llmtool.sim.workload import Workload
from llmtool.workload.arrivals import gamma
from llmtool.workload.traces import TRACE_FORMATS, TraceRow, read_trace


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal lengths: means in tokens and standard deviations of the logarithm; longest: of prompt and
    output."""

    mean_input: float
    mean_output: float
    spread_input: float
    spread_output: float
    longest: tuple[int, int]
    source: str


NAMED: Mapping[str, Lengths] = {
    "chat": Lengths(161, 338, 1.0, 1.0, (2048, 2048), "ShareGPT, PagedAttention (2309.06180), section 6.1"),
    "conversation": Lengths(1155, 211, 0.50, 0.99, (8192, 1024), "Azure conversation trace 2023 (Splitwise)"),
    "code": Lengths(2048, 28, 0.82, 1.24, (8192, 1024), "Azure code trace 2023 (Splitwise)"),
    "summarization": Lengths(2588, 291, 0.40, 1.05, (8192, 2048), "arXiv summaries as in Vidur"),
    "creation": Lengths(325, 798, 0.21, 0.30, (1024, 2048), "creation requests of APEX (2411.17651)"),
}


def named_rows(name: str, count: int, seed: int) -> list[tuple[int, int]]:
    """(input, output) tokens of `count` requests. Raises UsageError for an unknown name."""
    if name not in NAMED:
        raise UsageError(
            f"The workload {name!r} is unknown.", f"Known: {', '.join(NAMED)}; or give --trace FILE."
        )
    lengths, rng = NAMED[name], np.random.default_rng(seed)

    def draw(mean: float, spread: float, longest: int) -> list[int]:
        values = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
        return [int(v) for v in np.clip(np.round(values), 1, longest)]

    inputs = draw(lengths.mean_input, lengths.spread_input, lengths.longest[0])
    outputs = draw(lengths.mean_output, lengths.spread_output, lengths.longest[1])
    return list(zip(inputs, outputs, strict=True))


def make_workload(
    name: str | None,
    count: int,
    *,
    trace: str | Path | None = None,
    trace_format: str | None = None,
    lengths: tuple[int, int] | None = None,
    request_rate: float | None = None,
    burstiness: float = 1.0,
    concurrency: int | None = None,
    seed: int = 0,
) -> Workload:
    """A trace's requests, or `count` requests of a named workload or of fixed lengths; at their own times, at
    request_rate, or by `concurrency` clients."""
    if count < 1:
        raise UsageError(f"The number of requests must be at least 1, not {count}.")
    if request_rate is not None and concurrency is not None:
        raise UsageError("A request rate and a number of clients exclude each other.", "Give one of them.")
    title = name or "requests"
    if trace is not None:
        rows = read_trace(trace_format or guess_format(trace), trace, count)
        title = Path(trace).name
    elif lengths is not None:
        rows = [TraceRow(None, *lengths)] * count
        title = f"{lengths[0]} in, {lengths[1]} out"
    else:
        rows = [TraceRow(None, a, b) for a, b in named_rows(title, count, seed)]
    if concurrency is not None:
        return Workload(
            title, tuple(TraceRow(None, r.input_len, r.output_len, r.hash_ids) for r in rows), concurrency
        )
    if request_rate is not None:
        offsets = gamma(len(rows), request_rate, burstiness, np.random.default_rng(seed)).tolist()
        rows = [
            TraceRow(t, r.input_len, r.output_len, r.hash_ids) for t, r in zip(offsets, rows, strict=True)
        ]
    return Workload(title, tuple(rows))


def write_trace(workload: Workload, path: str | Path) -> None:
    """The requests as a trace that `bench` replays (Vidur's columns); a closed loop's have no times."""
    timed = workload.concurrency is None
    head = ["arrived_at"] if timed else []
    lines = [",".join([*head, "num_prefill_tokens", "num_decode_tokens"])]
    for row in workload.rows:
        at = [f"{row.arrival:.6f}"] if timed else []
        lines.append(",".join([*at, str(row.input_len), str(row.output_len)]))
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as e:
        raise LLMToolError(f"Cannot write the trace {path}: {e.strerror or e}.") from None


def guess_format(path: str | Path) -> str:
    """A trace's format by its first line. Raises UsageError."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            head = file.readline()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text"
        raise UsageError(f"Cannot read the trace {path}: {reason}.") from None
    if not head.strip():
        raise UsageError(f"The trace {path} is empty.")
    if head.lstrip().startswith("{"):
        return "mooncake"
    for name, column in (
        ("azure", "ContextTokens"),
        ("burstgpt", "Request tokens"),
        ("lengths", "num_prefill_tokens"),
    ):
        if column in head:
            return name
    raise UsageError(
        f"{path} is in no known trace format.",
        f"Known: {', '.join(TRACE_FORMATS)}; name it with --trace-format.",
    )
