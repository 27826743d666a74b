"""Recorded traces: who asked for how many tokens when. Rows are numbers, so that `plan` can replay them.

Formats: Azure LLM inference traces 2023/2024 (CSV), BurstGPT (CSV, arXiv 2401.17644), plain length pairs as
Vidur has them (CSV, untimed unless `arrived_at` is there), Mooncake (JSONL with prefix block hashes, arXiv
2407.00079).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from llmtool.errors import UsageError
from llmtool.workload.files import bad_line, csv_rows, integer, jsonl_rows, number
from llmtool.workload.requests import BenchRequest, TokenSource

MOONCAKE_BLOCK = 512  # tokens per hash id in the published traces


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request. arrival: seconds after the trace's first request (None: untimed). hash_ids: one
    id per prefix block; equal ids at equal places mean equal prompt prefixes."""

    arrival: float | None
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CsvFormat:
    """Column names of a CSV trace, and how its time stamp turns into seconds."""

    arrival: str | None
    input_len: str
    output_len: str
    seconds: Callable[[str], float] = float

    def columns(self) -> set[str]:
        return {c for c in (self.arrival, self.input_len, self.output_len) if c}


def _azure_seconds(stamp: str) -> float:
    """`2023-11-16 18:15:46.6805900`, or with an offset. fromisoformat would drop the seventh digit."""
    head, _, rest = stamp.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    moment = datetime.fromisoformat(head + rest[len(digits) :])
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)


CSV_FORMATS: Mapping[str, CsvFormat] = {
    "azure": CsvFormat("TIMESTAMP", "ContextTokens", "GeneratedTokens", _azure_seconds),
    "burstgpt": CsvFormat("Timestamp", "Request tokens", "Response tokens"),
    "vidur": CsvFormat("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    "lengths": CsvFormat(None, "num_prefill_tokens", "num_decode_tokens"),
}
TRACE_FORMATS = ("azure", "burstgpt", "lengths", "mooncake")


def read_trace(name: str, path: str | Path, limit: int | None = None) -> list[TraceRow]:
    """The first `limit` usable rows of a trace in order of arrival; name is one of TRACE_FORMATS.

    Rows without output (BurstGPT records failed calls so) are left out. UsageError on a bad file.
    """
    if name not in TRACE_FORMATS:
        raise UsageError(f"Unknown trace format {name!r}.", f"Known: {', '.join(TRACE_FORMATS)}.")
    rows = [row for row in (_mooncake(path) if name == "mooncake" else _csv(name, path)) if row.output_len]
    if not rows:
        raise UsageError(
            f"{path} has no usable request.", "Each needs at least one input and one output token."
        )
    if rows[0].arrival is None:
        return rows[:limit]
    rows.sort(key=lambda row: row.arrival or 0.0)  # stable: equal times keep the file's order
    first = rows[0].arrival or 0.0
    return [
        TraceRow((row.arrival or 0.0) - first, row.input_len, row.output_len, row.hash_ids)
        for row in rows[:limit]
    ]


def _csv(name: str, path: str | Path) -> Iterator[TraceRow]:
    layout = CSV_FORMATS[name]
    for line, row in csv_rows(path):
        if name == "lengths" and "arrived_at" in row:
            layout = CSV_FORMATS["vidur"]
        missing = layout.columns() - row.keys()
        if missing:
            raise bad_line(
                path,
                1,
                f"the columns {', '.join(sorted(layout.columns()))}; {sorted(missing)[0]!r} is missing",
            )
        arrival = None
        if layout.arrival:
            try:
                arrival = layout.seconds(row[layout.arrival])
            except ValueError:
                raise bad_line(
                    path, line, f"{layout.arrival!r} to be a time stamp, not {row[layout.arrival]!r}"
                ) from None
        yield TraceRow(
            arrival,
            integer(path, line, row, layout.input_len, 1),
            integer(path, line, row, layout.output_len),
        )


def _mooncake(path: str | Path) -> Iterator[TraceRow]:
    for line, row in jsonl_rows(path):
        ids = row.get("hash_ids", [])
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise bad_line(path, line, "'hash_ids' to be a list of non-negative integers")
        input_len = integer(path, line, row, "input_length", 1)
        if ids and not (len(ids) - 1) * MOONCAKE_BLOCK < input_len <= len(ids) * MOONCAKE_BLOCK:
            wanted = -(-input_len // MOONCAKE_BLOCK)
            raise bad_line(
                path,
                line,
                f"{wanted} hash_ids (one per {MOONCAKE_BLOCK} of {input_len} tokens), not {len(ids)}",
            )
        yield TraceRow(
            number(path, line, row, "timestamp") / 1000.0,  # milliseconds in the file
            input_len,
            integer(path, line, row, "output_length"),
            tuple(ids),
        )


def trace_requests(
    rows: Sequence[TraceRow], source: TokenSource, seed: int, block_size: int = MOONCAKE_BLOCK
) -> list[BenchRequest]:
    """Prompts of the recorded lengths: English passages, or, where a row has hash_ids, blocks that really
    repeat.

    block_size: tokens per hash id in the prompts made. A smaller one than the trace's 512 shrinks every
    prompt by that factor and keeps who shares how much of it: a trace of 100,000-token prompts then fits a
    small machine.
    """
    if block_size < 2:
        raise UsageError(f"The trace's block size must be at least 2 tokens, not {block_size}.")
    rng = np.random.default_rng(seed)
    # Random ids, not passages: two passages may start alike, and then share a block that the trace does not.
    blocks: dict[int, list[int]] = {}

    def block(hash_id: int) -> list[int]:
        if hash_id not in blocks:
            blocks[hash_id] = source.random(block_size, np.random.default_rng([seed, hash_id]))
        return blocks[hash_id]

    requests = []
    for row in rows:
        if row.hash_ids:
            length = max(1, round(row.input_len * block_size / MOONCAKE_BLOCK))
            ids = [token for hash_id in row.hash_ids for token in block(hash_id)][:length]
        else:
            ids = source.passage(row.input_len, rng)
        requests.append(
            BenchRequest(
                token_ids=tuple(ids), prompt_len=len(ids), max_tokens=row.output_len, arrival=row.arrival
            )
        )
    return requests
