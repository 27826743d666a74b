"""What is asked of a simulated deployment: requests with lengths and moments, or a closed loop of clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmtool.errors import UsageError
from llmtool.sim.replica import SimRequest
from llmtool.workload.traces import MOONCAKE_BLOCK, TraceRow


@dataclass(frozen=True, slots=True)
class Workload:
    """rows: in order of arrival. concurrency: None replays the rows' arrivals; a number is so many clients, each of
    which sends its next request when its last one has ended."""

    name: str
    rows: tuple[TraceRow, ...]
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise UsageError(f"The workload {self.name!r} has no requests.")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"The concurrency must be at least 1, not {self.concurrency}.")
        if self.concurrency is None and any(row.arrival is None for row in self.rows):
            raise UsageError(
                f"The workload {self.name!r} has no arrival times.",
                "Give --request-rate or --max-concurrency.",
            )

    @property
    def max_len(self) -> int:
        return max(row.input_len + row.output_len for row in self.rows)

    @property
    def mean_input(self) -> float:
        return sum(row.input_len for row in self.rows) / len(self.rows)

    @property
    def mean_output(self) -> float:
        return sum(row.output_len for row in self.rows) / len(self.rows)

    @property
    def rate(self) -> float | None:
        """Requests per second offered; None for a closed loop."""
        if self.concurrency is not None:
            return None
        last = self.rows[-1].arrival or 0.0
        return (len(self.rows) - 1) / last if last > 0 else float("inf")

    @property
    def shares_prefixes(self) -> bool:
        return any(row.hash_ids for row in self.rows)

    def head(self, count: int) -> Workload:
        """The first `count` requests."""
        return Workload(self.name, self.rows[:count], self.concurrency)

    def faster(self, factor: float) -> Workload:
        """The same requests, `factor` times as fast, or so many times the clients."""
        if self.concurrency is not None:
            return Workload(self.name, self.rows, max(1, round(self.concurrency * factor)))
        rows = tuple(
            TraceRow((r.arrival or 0.0) / factor, r.input_len, r.output_len, r.hash_ids) for r in self.rows
        )
        return Workload(self.name, rows)


def sim_request(index: int, row: TraceRow, at: float) -> SimRequest:
    """Row `index` as a request. Prompts share pages where rows have hash_ids, and nowhere else."""
    prompt: Sequence[int]
    if row.hash_ids:
        prompt = [h + 2 for h in row.hash_ids for _ in range(MOONCAKE_BLOCK)][: row.input_len]
    else:
        prompt = [index + 2] * row.input_len
    return SimRequest(f"{index:07d}", at, prompt, row.output_len)
