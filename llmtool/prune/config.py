"""What `llmtool prune` was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmtool.errors import UsageError

METHODS = ("obs", "paper", "magnitude", "random", "wanda-sp", "flap")
EXPORTS = ("hf", "onnx", "gguf")


@dataclass(frozen=True, slots=True)
class PruneConfig:
    """budget: kind -> share of the dense model's cost. task, data, text: at most one; none is label-free on bundled
    text. sweep: shares to try beside or instead of a budget. latency_batch: sequences at which latency is measured
    for a latency budget. command: as it was typed, for the report."""

    model: str
    budget: Mapping[str, float] = field(default_factory=dict)
    task: str | None = None
    data: Path | None = None
    text: Path | None = None
    samples: int = 512
    method: str = "obs"
    granularity: int | None = None
    uniform: bool = False
    export: tuple[str, ...] = ("hf",)
    draft: bool = False
    sweep: tuple[float, ...] = ()
    seed: int = 0
    output: Path = Path("pruned")
    device: str | None = None
    latency_batch: int = 1
    rounds: int | None = None
    command: str = ""

    def check(self) -> None:
        """Raises UsageError for what makes no sense, before anything is loaded."""
        if self.method not in METHODS:
            raise UsageError(f"There is no method {self.method!r}.", f"Give one of {', '.join(METHODS)}.")
        unknown = set(self.export) - set(EXPORTS)
        if unknown:
            raise UsageError(
                f"There is no export {sorted(unknown)[0]!r}.", f"Give some of {', '.join(EXPORTS)}."
            )
        if sum(x is not None for x in (self.task, self.data, self.text)) > 1:
            raise UsageError("--task, --data and --text exclude each other.", "Give one of them.")
        if not self.budget and not self.sweep and not self.draft:
            raise UsageError(
                "There is no budget.", "Give --flops, --latency, --params or --kv, such as --flops 0.5."
            )
        if self.uniform and self.method != "obs":
            raise UsageError("--uniform is for --method obs.", "Leave one of them out.")
        for share in self.sweep:
            if not 0 < share <= 1:
                raise UsageError(f"--sweep has {share:g}, and shares must be over 0 and at most 1.")


def parse_sweep(text: str | None) -> tuple[float, ...]:
    """Shares of "0.3:1.0:0.1" (from, to, step) or "0.5,0.7". Raises UsageError."""
    if text is None:
        return ()
    try:
        if ":" in text:
            low, high, step = (float(part) for part in text.split(":"))
            if step <= 0 or high < low:
                raise ValueError
            count = int((high - low) / step + 1e-9) + 1
            return tuple(round(low + i * step, 6) for i in range(count))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{text!r} is no sweep.", "Write for example --sweep 0.3:1.0:0.1 (from:to:step)."
        ) from None
