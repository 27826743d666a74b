"""A simulated run as a trace for ui.perfetto.dev (Chrome's JSON events): a track per engine, a slice per step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtool.errors import LLMToolError
from llmtool.sim.simulate import SimResult


def trace_events(result: SimResult) -> list[dict[str, Any]]:
    """result: of a simulation with record=True. Times in microseconds. Steps of decoding alone that were taken
    together are one slice, with their number."""
    events: list[dict[str, Any]] = []
    for engine, totals in enumerate(result.totals):
        name = {"name": f"engine {engine}"}
        events.append({"ph": "M", "pid": 1, "tid": engine, "name": "thread_name", "args": name})
        for start, seconds, decodes, prompt, steps in totals.timeline:
            kind = "prefill + decode" if prompt and decodes else "prefill" if prompt else "decode"
            args = {"sequences": decodes, "prompt_tokens": prompt, "steps": steps}
            at = {"pid": 1, "tid": engine, "ts": start * 1e6}
            events.append({"ph": "X", "name": kind, "dur": seconds * 1e6, "args": args, **at})
            events.append(
                {
                    "ph": "C",
                    "name": f"running {engine}",
                    "pid": 1,
                    "ts": start * 1e6,
                    "args": {"sequences": decodes},
                }
            )
    for f in result.finished:
        track = {"cat": "request", "id": f.id, "pid": 2, "tid": 0}
        args = {"prompt": f.prompt_tokens, "output": f.output_tokens}
        for phase, begin, end in (
            ("queued", f.arrival, f.first_scheduled),
            ("prefill", f.first_scheduled, f.first_token),
            ("decode", f.first_token, f.finished),
        ):
            events.append({"ph": "b", "name": phase, "ts": begin * 1e6, "args": args, **track})
            events.append({"ph": "e", "name": phase, "ts": end * 1e6, **track})
    return events


def write_perfetto(result: SimResult, path: str | Path) -> None:
    """Raises LLMToolError where the file cannot be written."""
    try:
        Path(path).write_text(json.dumps({"traceEvents": trace_events(result)}) + "\n", encoding="utf-8")
    except OSError as e:
        raise LLMToolError(f"Cannot write the trace {path}: {e.strerror or e}.") from None
