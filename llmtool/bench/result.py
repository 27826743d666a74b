"""The result file: vLLM's keys for the numbers, ours for how they came about.

A result of one run has the metrics at the top, so that tools for vLLM's result files read it. A sweep or knee
search has them under `runs`, one entry per rate, and `knee` says which rate held.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtool.bench.probe import ClientLoad
from llmtool.errors import LLMToolError, UsageError
from llmtool.workload.metrics import RequestRecord

SCHEMA_VERSION = 1
KINDS = ("run", "sweep", "knee")
REQUIRED = ("duration", "completed", "input_lens", "output_lens", "ttfts", "itls", "errors")


@dataclass(frozen=True, slots=True)
class RunResult:
    """One measured run. request_rate: requests/s offered, infinity when all at once. metrics: `summarize`'s
    keys. server: what the server counted (counters.py). warnings: sentences a reader of the numbers must
    know.
    """

    request_rate: float
    metrics: Mapping[str, Any]
    client: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    generated_texts: tuple[str, ...] | None = None
    arrivals: str | None = None  # "trace" or "ramp A to B", where no one rate says it

    def as_dict(self) -> dict[str, Any]:
        out = {"request_rate": self.arrivals or _json_rate(self.request_rate), **self.metrics, **self.server}
        if self.generated_texts is not None:
            out["generated_texts"] = list(self.generated_texts)
        return out | {"client": dict(self.client), "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        texts, rate = data.get("generated_texts"), data.get("request_rate") or math.inf
        arrivals = rate if isinstance(rate, str) and rate.startswith(("trace", "ramp")) else None
        return cls(
            request_rate=math.inf if arrivals else float(rate),
            arrivals=arrivals,
            # Some of vLLM's versions write no `failed`.
            metrics={"failed": sum(map(bool, data["errors"]))}
            | {k: v for k, v in data.items() if k not in _NOT_METRICS},
            client=data.get("client") or {},
            warnings=tuple(data.get("warnings") or ()),
            generated_texts=tuple(texts) if texts is not None else None,
        )

    def records(self) -> list[RequestRecord]:
        """The requests again, for figures and comparisons; what a vLLM file lacks is derived or left at
        zero.
        """
        m = self.metrics
        ttfts, itls, errors = m["ttfts"], m["itls"], m["errors"]
        starts = m.get("start_times") or [0.0] * len(ttfts)
        # A vLLM file has no end-to-end times, but a request's are its first chunk's and all gaps after it.
        e2els = m.get("e2els") or [t + sum(gaps) for t, gaps in zip(ttfts, itls, strict=True)]
        first = min(starts, default=0.0)
        return [
            RequestRecord(
                index=i,
                start=starts[i] - first,
                ttft=ttfts[i],
                itls=list(itls[i]),
                e2e=e2els[i],
                prompt_tokens=m["input_lens"][i],
                output_tokens=m["output_lens"][i],
                success=not errors[i] and e2els[i] > 0,
                error=errors[i],
            )
            for i in range(len(ttfts))
        ]


# Keys of a run's object that are not its metrics. The server's counters count as metrics once they are in a file.
_ABOUT_THE_RUN = "request_rate client warnings generated_texts runs knee config hardware versions"
_ABOUT_THE_FILE = (
    "schema_version kind date label backend model_id num_prompts burstiness max_concurrency seed"
)
_NOT_METRICS = frozenset((_ABOUT_THE_RUN + " " + _ABOUT_THE_FILE).split())


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What `llmtool bench` measured. kind: run | sweep | knee. knee: of a search, see sweep.Knee.as_dict."""

    kind: str
    runs: tuple[RunResult, ...]
    config: Mapping[str, Any]
    backend: str
    model: str
    seed: int
    date: str  # ISO 8601, UTC
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    label: str | None = None
    knee: Mapping[str, Any] | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all runs, each sentence once."""
        return tuple(dict.fromkeys(w for run in self.runs for w in run.warnings))

    def as_dict(self) -> dict[str, Any]:
        head = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "date": self.date,
            "label": self.label,
            "backend": self.backend,
            "model_id": self.model,
            "seed": self.seed,
            "num_prompts": max(len(run.metrics["errors"]) for run in self.runs),
            "burstiness": self.config.get("burstiness"),
            "max_concurrency": self.config.get("max_concurrency"),
        }
        tail = {"config": dict(self.config), "hardware": dict(self.hardware), "versions": dict(self.versions)}
        if self.kind == "run":
            return head | self.runs[0].as_dict() | tail
        knee = {"knee": dict(self.knee)} if self.knee is not None else {}
        return head | knee | {"runs": [run.as_dict() for run in self.runs]} | tail

    def write(self, path: str | Path) -> None:
        write_json(self.as_dict(), path)


def write_json(data: Mapping[str, Any], path: str | Path) -> None:
    """One JSON document, put in place in one step: a reader never sees half of it. Raises LLMToolError."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise LLMToolError(f"Cannot write the result {path}: {e.strerror or e}.") from None


def read_result(path: str | Path) -> BenchResult:
    """A result file of ours, or one of vLLM's `bench serve --save-result --save-detailed`. UsageError
    otherwise.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"Cannot read the result {path}: {e.strerror or e}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not JSON: {e}.", "Is it a result of `llmtool bench`?") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is no bench result but a JSON {type(data).__name__}.")
    version = data.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {version}; this llmtool reads {SCHEMA_VERSION}.", "Update llmtool."
        )
    kind = data.get("kind", "run")
    runs = [data] if kind == "run" else data.get("runs")
    if kind not in KINDS or not isinstance(runs, list) or not runs:
        raise UsageError(f"{path} is no bench result: kind is {kind!r} and runs are {type(runs).__name__}.")
    for run in runs:
        _check_run(path, run)
    return BenchResult(
        kind=kind,
        runs=tuple(RunResult.from_dict(run) for run in runs),
        config=data.get("config") or {},
        backend=str(data.get("backend", "")),
        model=str(data.get("model_id", "")),
        seed=int(data.get("seed") or 0),
        date=str(data.get("date", "")),
        hardware=data.get("hardware") or {},
        versions=data.get("versions") or {},
        label=data.get("label"),
        knee=data.get("knee"),
    )


def _check_run(path: str | Path, run: Any) -> None:
    missing = [key for key in REQUIRED if not isinstance(run, dict) or key not in run]
    if missing:
        raise UsageError(
            f"{path} is no bench result: {', '.join(missing)} missing.",
            "vLLM's files need --save-detailed to carry every request.",
        )
    lists = [run[key] for key in ("input_lens", "output_lens", "ttfts", "itls", "errors")]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise UsageError(f"{path} is no bench result: its lists per request have different lengths.")


def make_run(
    rate: float,
    metrics: Mapping[str, Any],
    records: list[RequestRecord],
    client: ClientLoad,
    server: Mapping[str, Any],
    keep_text: bool,
) -> RunResult:
    return RunResult(
        request_rate=rate,
        metrics=metrics,
        client=client.as_dict(),
        server=server,
        warnings=tuple(cautions(records)) + client.warnings,
        generated_texts=tuple(r.text for r in records) if keep_text else None,
    )


def cautions(records: list[RequestRecord]) -> list[str]:
    """What a reader must know before trusting the numbers of these requests."""
    out = []
    done = [r for r in records if r.success]
    failed = len(records) - len(done)
    if failed:
        error = next(r.error for r in records if not r.success)
        out.append(f"{failed} of {len(records)} requests failed, the first with: {error}")
    if done and not all(r.counted for r in done):
        out.append("The server reports no token usage: output tokens are counted as stream chunks.")
    asked = [(r.output_tokens, r.max_tokens) for r in done if r.max_tokens]
    short = [(got, wanted) for got, wanted in asked if got < wanted]
    if len(short) > len(asked) / 20:
        mean_got, mean_asked = (sum(x[i] for x in asked) / len(asked) for i in (0, 1))
        out.append(
            f"Outputs ended early: {mean_got:.0f} tokens on average where {mean_asked:.0f} were asked for. "
            "Give --ignore-eos to fix the lengths."
        )
    return out


def _json_rate(rate: float) -> float | str:
    return "inf" if math.isinf(rate) else rate
