"""Plans as JSON: what was measured and decided. Not recordings, graphs or weights. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtool.runtime.aot.prepare import Plan, Stored


def dump(plan: Plan) -> dict[str, Any]:
    machine = plan.machine
    assert machine is not None
    return {
        "schedule": plan.schedule,
        "streams": list(plan.assignment.streams),
        "waits": [list(edge) for edge in plan.assignment.waits],
        "task_seconds": [task.seconds for task in machine.graph.tasks],
        "seconds": plan.seconds,
        "predicted": plan.predicted,
        "fingerprint": plan.fingerprint,
    }


def parse(data: dict[str, Any]) -> Stored:
    """Raises ValueError, KeyError or TypeError for what `dump` did not make."""
    from llmtool.runtime.aot.prepare import Stored

    fingerprint = [str(line) for line in data["fingerprint"]]
    n = len(fingerprint)
    streams = tuple(int(s) for s in data["streams"])
    waits = tuple((int(u), int(v)) for u, v in data["waits"])
    seconds = tuple(float(s) for s in data["task_seconds"])
    if len(streams) != n or len(seconds) != n or not all(0 <= u < v < n for u, v in waits):
        raise ValueError("its schedule is not one of its tasks")
    measured = {str(k): float(v) for k, v in data["seconds"].items()}
    predicted = {str(k): float(v) for k, v in data["predicted"].items()}
    return Stored(str(data["schedule"]), streams, waits, seconds, measured, predicted, fingerprint)
