"""The step log: every decision and result of a run, one JSON row each, and its replay.

Rows: `header` (settings and page geometry), `add`, `abort`, `schedule` (the decision), `result` (tokens). A replay
builds the same policy from the header, feeds it the same events at the same moments, hands back the recorded
results and compares every decision: any drift between two versions of the policy shows at its first step.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from llmtool.config import SchedulerConfig
from llmtool.core.memory.geometry import KVCacheGroup, LayerCacheSpec
from llmtool.core.memory.hashing import page_hash
from llmtool.core.memory.model import LayerType, ModelGeometry
from llmtool.core.memory.page_plan import PagePlan, Pool
from llmtool.core.memory.select import make_allocator
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import Drafts, DraftTree, SchedulerOutput, StepResult
from llmtool.core.request import BeamParams, Grammar, Request, SamplingParams, TokenLogprob
from llmtool.core.scheduler import Scheduler
from llmtool.core.stats import SpecCounters
from llmtool.errors import UsageError

VERSION = 1


def decision(out: SchedulerOutput) -> dict[str, Any]:
    """A step's decision as plain data, complete: two equal ones make any executor do the same."""
    return {
        "step": out.step_id,
        "finished": list(out.finished),
        "preempted": list(out.preempted),
        "swap_out": [(c.src, c.dst) for c in out.swap_out],
        "swap_in": [(c.src, c.dst) for c in out.swap_in],
        "copies": [(c.src, c.dst) for c in out.copies],
        "new": [
            (
                n.id,
                _digest(n.token_ids),
                n.num_prompt_tokens,
                n.seed,
                params_to_dict(n.params),
                [*map(list, n.tables)],
            )
            for n in out.new
        ],
        "scheduled": [
            (
                s.id,
                s.start,
                s.num_tokens,
                s.sample,
                list(s.new_token_ids),
                [list(p) for p in s.new_pages],
                list(s.table_edits),
                *([list(s.draft), list(s.keep_pages)] if s.draft or s.keep_pages else ()),
                *([list(s.parents)] if s.parents else ()),
            )
            for s in out.scheduled
        ],
        **({"received": [(r.id, [*map(list, r.entries)]) for r in out.received]} if out.received else {}),
    }


def _digest(tokens: Sequence[int]) -> str:
    return page_hash(b"", tokens).hex()


def params_to_dict(params: SamplingParams) -> dict[str, Any]:
    """Only what differs from the defaults."""
    default = SamplingParams()
    changed: dict[str, Any] = {}
    for f in fields(params):
        value = getattr(params, f.name)
        if value != getattr(default, f.name):
            changed[f.name] = asdict(value) if isinstance(value, Grammar | BeamParams) else value
    return changed


def params_from_dict(data: dict[str, Any]) -> SamplingParams:
    data = dict(data)
    if "grammar" in data:
        data["grammar"] = Grammar(**data["grammar"])
    if "beam" in data:
        data["beam"] = BeamParams(**data["beam"])
    for name in ("stop_token_ids", "cache_hints"):
        if name in data:
            data[name] = tuple(data[name])
    if "logit_bias" in data:
        data["logit_bias"] = {int(k): v for k, v in data["logit_bias"].items()}
    return SamplingParams(**data)


class StepLogWriter:
    """Appends rows to `file` (text). The caller closes it. kv_cache_dtype: for whoever reads it."""

    def __init__(self, file: IO[str], scheduler: Scheduler, kv_cache_dtype: str = "") -> None:
        self._file = file
        allocator = scheduler.allocator
        assert isinstance(allocator, UniformAllocator | TwoLevelAllocator)
        pages = allocator.groups[0] if isinstance(allocator, UniformAllocator) else allocator.plan
        self._row(
            "header",
            version=VERSION,
            config=asdict(scheduler.config),
            **{"group" if isinstance(pages, KVCacheGroup) else "plan": asdict(pages)},
            kv_cache_dtype=kv_cache_dtype,
            num_pages=allocator.num_pages,
            host_pages=allocator.host_pages,
            prefix_caching=allocator.prefix_caching,
            eos=sorted(scheduler.eos_token_ids),
        )

    def _row(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **values}, separators=(",", ":")) + "\n")

    def add(
        self,
        now: float,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str,
        seed: int,
        moves: Mapping[str, Any] | None = None,
    ) -> None:
        """moves: what of handoff, given and moved there is."""
        self._row(
            "add",
            now=now,
            id=request_id,
            prompt=list(prompt),
            params=params_to_dict(params),
            priority=priority,
            salt=cache_salt,
            seed=seed,
            **{name: value for name, value in (moves or {}).items() if value},
        )

    def abort(self, now: float, request_id: str, index: int | None) -> None:
        self._row("abort", now=now, id=request_id, index=index)

    def schedule(self, now: float, out: SchedulerOutput) -> None:
        self._row("schedule", now=now, **decision(out))

    def result(self, now: float, result: StepResult) -> None:
        row: dict[str, Any] = {"step": result.step_id, "tokens": result.tokens, "seconds": result.seconds}
        if result.logprobs:  # they decide beam searches
            row["logprobs"] = {
                k: [(p.token, p.logprob, p.rank, p.top) for p in v] for k, v in result.logprobs.items()
            }
        if result.errors:
            row["errors"] = dict(result.errors)
        self._row("result", now=now, **row)


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a log; UsageError names the first line that is none."""
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                kind = row["kind"]
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"Line {number} of {path} is not a row of a step log.") from None
            if number == 1 and (kind != "header" or row.get("version") != VERSION):
                raise UsageError(f"{path} does not start with a step-log header of version {VERSION}.")
            yield row


def result_from_row(row: dict[str, Any]) -> StepResult:
    logprobs = {
        k: [TokenLogprob(t, lp, rank, tuple((a, b) for a, b in top)) for t, lp, rank, top in v]
        for k, v in row.get("logprobs", {}).items()
    }
    errors = row.get("errors", {})
    return StepResult(row["step"], row["tokens"], logprobs, errors=errors, seconds=row["seconds"])


def scheduler_from_header(header: dict[str, Any], drafts: Drafts | None = None) -> Scheduler:
    config = SchedulerConfig(**header["config"])
    allocator = make_allocator(
        _plan(header["plan"]) if "plan" in header else _group(header["group"]),
        header["num_pages"],
        header["host_pages"],
        header["prefix_caching"],
        config.max_num_batched_tokens,
    )
    return Scheduler(config, allocator, header["eos"], drafts)


def _layers(rows: Sequence[dict[str, Any]]) -> tuple[LayerCacheSpec, ...]:
    return tuple(LayerCacheSpec(**row) for row in rows)


def _group(row: dict[str, Any]) -> KVCacheGroup:
    offsets = tuple(row["layer_offsets"])
    return KVCacheGroup(**row | {"layers": _layers(row["layers"]), "layer_offsets": offsets})


def _plan(row: dict[str, Any]) -> PagePlan:
    pools = [
        Pool(
            LayerType(pool["type"]["name"], _layers(pool["type"]["layers"])),
            tuple(_group(group) for group in pool["groups"]),
            pool["per_large"],
        )
        for pool in row["pools"]
    ]
    geometry = ModelGeometry(row["geometry"]["name"], _layers(row["geometry"]["layers"]))
    return PagePlan(row["mode"], geometry, row["large_page"], tuple(pools))


class ReplayExecutor:
    """Hands back recorded results in order, whatever is submitted."""

    def __init__(self, results: Sequence[StepResult], max_in_flight: int = 1) -> None:
        self.max_in_flight = max_in_flight
        self._results = deque(results)

    def submit(self, out: SchedulerOutput) -> None:
        pass

    def collect(self) -> StepResult:
        return self._results.popleft()


class RecordedDrafts:
    """The drafts of the step that is decided next: to a replay they are given, as results are."""

    def __init__(self) -> None:
        self.drafts: dict[str, list[int] | DraftTree] = {}

    def plan(
        self, out: SchedulerOutput, decoding: Sequence[int], work: Sequence[Request], room: int
    ) -> list[list[int] | DraftTree]:
        return [self.drafts.get(work[i].id, []) for i in decoding]

    def record(self, out: SchedulerOutput, result: StepResult) -> None:
        pass

    def forget(self, ended: Sequence[str]) -> None:
        pass

    def count(self, counters: SpecCounters) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Replay:
    """steps: decisions compared. mismatch: None, or (step, recorded, made) of the first that differs."""

    steps: int
    mismatch: tuple[int, dict[str, Any], dict[str, Any]] | None


def replay(path: str | Path) -> Replay:
    """Run the policy again over a recorded run, on the recorded clock, and compare each decision."""
    rows = read_rows(path)
    drafts = RecordedDrafts()
    scheduler = scheduler_from_header(next(rows), drafts)
    in_flight: deque[SchedulerOutput] = deque()
    steps = 0
    for row in rows:
        now = row["now"]
        if row["kind"] == "add":
            params = params_from_dict(row["params"])
            scheduler.add(
                row["id"],
                row["prompt"],
                params,
                now,
                priority=row["priority"],
                cache_salt=row["salt"],
                seed=row["seed"],
                handoff=row.get("handoff", False),
                given=row.get("given", ()),
                moved=row.get("moved", False),
            )
        elif row["kind"] == "abort":
            scheduler.abort(row["id"], row["index"], now)
        elif row["kind"] == "schedule":
            drafts.drafts = {
                s[0]: DraftTree(s[7], s[9]) if len(s) > 9 else s[7] for s in row["scheduled"] if len(s) > 7
            }
            out = scheduler.schedule(now)
            made = json.loads(json.dumps(decision(out)))
            recorded = {k: v for k, v in row.items() if k not in ("kind", "now")}
            steps += 1
            if made != recorded:
                return Replay(steps, (row["step"], recorded, made))
            in_flight.append(out)
        elif row["kind"] == "result":
            scheduler.update(in_flight.popleft(), result_from_row(row), now)
            scheduler.handed.clear()
    return Replay(steps, None)
