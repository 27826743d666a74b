"""From a contender that runs to the figures of one mode, and the loop that interleaves the contenders."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.catalogue import Contender
from benchmarks.peers.cells import Cell, Store
from benchmarks.peers.probe import machine_probe
from benchmarks.peers.process import Contention
from benchmarks.peers.target import ContenderFailed, Outcome, Target
from benchmarks.peers.workload import Load
from llmtool.models.tokenizer import Tokenizer
from llmtool.workload.metrics import latencies_ms
from llmtool.workload.requests import BenchRequest

ONCE_ABOVE = 45.0  # seconds; batch and prefix of a contender that needs longer are not repeated
SHOWN = {  # the metrics that are printed as they come; all are kept
    "start": ("seconds",),
    "memory": ("peak_rss_gb",),
    "single": ("ttft_median_ms", "tpot_median_ms"),
    "batch": ("seconds", "output_tok_s"),
    "prefix": ("seconds",),
    "online": ("ttft_median_ms", "tpot_median_ms", "e2el_mean_ms", "e2el_p99_ms"),
}
START_TOKENS = 32  # of the prompt behind the first token


@dataclass(frozen=True, slots=True)
class Plan:
    """rounds: how often each contender is started and measured. modes: those wanted. deadline: on
    time.monotonic's clock, after which no further contender is started, or None."""

    rounds: int
    modes: Sequence[str]
    deadline: float | None = None


def figures(mode: str, outcome: Outcome) -> dict[str, Any]:
    """The metrics of a load that ran; definitions as in llmtool.workload.metrics. Times in ms, but `seconds`."""
    values = latencies_ms(outcome.records)
    tokens = sum(r.output_tokens for r in outcome.records)
    found: dict[str, Any] = {
        "requests": len(outcome.records),
        "seconds": round(outcome.duration, 4),
        "output_tok_s": round(tokens / outcome.duration, 2),
    }
    for name in ("ttft", "tpot", "e2el"):
        x = np.asarray(values[name])
        found |= {
            f"{name}_median_ms": round(float(np.median(x)), 3),
            f"{name}_mean_ms": round(float(np.mean(x)), 3),
            f"{name}_p99_ms": round(float(np.percentile(x, 99)), 3),
        }
    if mode == "single":
        found["texts"] = [r.text for r in outcome.records]  # whether it runs the same model
    return found


def run_plan(
    plan: Plan, contenders: Sequence[Contender], loads: Mapping[str, Load], store: Store,
    tokenizer: Tokenizer, logs: Path,
) -> None:  # fmt: skip
    """All missing cells, round by round, the contenders of a round in shuffled order, one alive at a time."""
    for turn in range(plan.rounds):
        order = list(contenders)
        random.Random(turn).shuffle(order)
        for contender in order:
            modes = [m for m in contender.modes if m in plan.modes and _wanted(store, turn, contender, m)]
            if not modes:
                continue
            if plan.deadline is not None and time.monotonic() > plan.deadline:
                print("The time is up; the next run goes on here.")
                return
            print(f"round {turn}, {contender.name}: {', '.join(modes)}", flush=True)
            _Block(turn, contender, modes, loads, store, tokenizer, logs).measure()


def _wanted(store: Store, turn: int, contender: Contender, mode: str) -> bool:
    if store.done(turn, contender.name, mode):
        return False
    earlier = [c.seconds for c in store.cells(contender.name, mode) if not c.error]
    return mode not in ("batch", "prefix") or not earlier or min(earlier) <= ONCE_ABOVE


class _Block:
    """One contender in one round: started, warmed, measured, ended."""

    def __init__(
        self, turn: int, contender: Contender, modes: Sequence[str], loads: Mapping[str, Load], store: Store,
        tokenizer: Tokenizer, logs: Path,
    ) -> None:  # fmt: skip
        self.turn, self.contender, self.modes, self.loads = turn, contender, list(modes), loads
        self.store, self.tokenizer = store, tokenizer
        self.log = logs / f"{contender.name}.log"
        self.probe: dict[str, float] = {}

    def measure(self) -> None:
        todo = list(self.modes)
        try:
            if not any(not c.error for c in self.store.cells(self.contender.name, "start")):
                self._fill_caches()
            self.probe = machine_probe()
            self._measure(todo)
        except ContenderFailed as e:
            for mode in todo:
                self._add(mode, error=str(e))

    def _fill_caches(self) -> None:
        """Starts it once unmeasured: what it compiles for good it compiles now, and its files come into memory."""
        with self._target() as target:
            target.first_token(self._first())

    def _measure(self, todo: list[str]) -> None:
        """Takes each mode out of `todo` once its cell is written."""
        with self._target() as target:
            with Contention(target.process.pid) as taken:
                seconds = target.first_token(self._first())
            # Recorded at every start, wanted or not: it costs nothing more.
            self._add("start", {"seconds": round(seconds, 3)}, seconds, taken)
            if "start" in todo:
                todo.remove("start")
            if todo:
                target.run(self.loads["warm"])
            measured = []
            while todo:
                mode = todo[0]
                try:
                    with Contention(target.process.pid) as taken:
                        outcome = target.run(self.loads[mode])
                except ContenderFailed as e:
                    if not target.process.alive:
                        raise
                    self._add(mode, error=str(e))  # what it refuses costs no other mode
                else:
                    self._add(mode, figures(mode, outcome), outcome.duration, taken)
                    measured.append(mode)
                todo.pop(0)
            if measured:
                peak = target.process.peak_rss
                self._add("memory", {"peak_rss_gb": round(peak / 1e9, 3), "after": measured})

    def _target(self) -> Target:
        return Target(self.contender, self.tokenizer, self.log)

    def _first(self) -> BenchRequest:
        ids = self.loads["warm"].requests[-1].token_ids or ()
        return BenchRequest(token_ids=ids[:START_TOKENS], max_tokens=1, prompt_len=START_TOKENS)

    def _add(
        self, mode: str, metrics: dict[str, Any] | None = None, seconds: float = 0.0,
        taken: Contention | None = None, error: str = "",
    ) -> None:  # fmt: skip
        load = (round(taken.foreign, 4), round(taken.stolen, 4)) if taken else (0.0, 0.0)
        cell = Cell(
            self.store.run, self.turn, self.contender.name, mode, metrics or {}, error, round(seconds, 3),
            *load, probe=self.probe,
        )  # fmt: skip
        self.store.add(cell)
        kept = {k: v for k, v in (metrics or {}).items() if k in SHOWN.get(mode, SHOWN["online"])}
        shown = error or ", ".join(f"{k} {v:g}" for k, v in kept.items())
        others = f"  [others {load[0] + load[1]:.0%}]" if taken else ""
        print(f"  {mode}: {shown}{others}", flush=True)


def median(values: Mapping[int, float]) -> float | None:
    return statistics.median(values.values()) if values else None
