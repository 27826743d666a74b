"""What an AotExecutor says about itself. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtool.runtime.aot.prepare import Plan


@dataclass(slots=True)
class Fallback:
    """Steps that run eagerly. shapes: of their tensors; final: no plan will be tried again; calls: so far."""

    shapes: list[tuple[int, ...]]
    reason: str
    final: bool
    calls: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """kind: inference or training. str() is for people, `document` for programs."""

    kind: str
    plans: list[Plan]
    fallbacks: list[Fallback]

    @property
    def arena_bytes(self) -> int:
        return sum(plan.arena for plan in self.plans)

    def document(self) -> dict[str, Any]:
        """Seconds and bytes, of each plan and fallback."""
        return {
            "kind": self.kind,
            "plans": [
                {
                    "schedule": p.schedule,
                    "tasks": p.tasks,
                    "concurrency": p.concurrency,
                    "streams": p.assignment.num_streams,
                    "synchronisations": p.assignment.synchronisations,
                    "arena_bytes": p.arena,
                    "outside_arena_bytes": p.loose,
                    "planned_arena_bytes": p.planned,
                    "no_reuse_bytes": p.no_reuse,
                    "predicted_seconds": p.predicted,
                    "measured_seconds": p.seconds,
                    "prepare_seconds": p.prepare_seconds,
                }
                for p in self.plans
            ],
            "fallbacks": [
                {"shapes": [list(s) for s in f.shapes], "reason": f.reason, "calls": f.calls}
                for f in self.fallbacks
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.kind}: {len(self.plans)} prepared, {len(self.fallbacks)} eager"]
        for p in self.plans:
            lines += [
                f"  {p.tasks} tasks, at most {p.concurrency} at once; {p.schedule}: "
                f"{_number(p.assignment.num_streams, 'stream')}, "
                f"{_number(p.assignment.synchronisations, 'synchronisation')}",
                f"  arena {p.arena:,} bytes, {p.loose:,} from torch; all in one arena {p.planned:,}, "
                f"without reuse {p.no_reuse:,}",
                f"  predicted {_times(p.predicted)}; measured {_times(p.seconds) or 'not'}; "
                f"prepared in {p.prepare_seconds:.2f} s",
            ]
        lines += [f"  eager, {f.shapes}: {f.reason} ({_number(f.calls, 'call')})" for f in self.fallbacks]
        return "\n".join(lines)


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in seconds.items())
