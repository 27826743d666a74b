"""The loop that makes policy and execution meet: schedule, submit, collect, update."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmtool.core.ports import Clock, Executor, MovesPages, SchedulerOutput
from llmtool.core.request import SamplingParams, SequenceOutput
from llmtool.core.scheduler import Scheduler
from llmtool.core.stats import EngineStats
from llmtool.core.steplog import StepLogWriter


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace. at: seconds after the trace's start."""

    at: float
    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    seed: int = 0


class Engine:
    """One model's policy and its executor, on one clock. Not thread-safe: one loop owns it."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, clock: Clock, log: StepLogWriter | None = None
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.last_step: SchedulerOutput | None = None
        self._log = log
        self._submitted: deque[SchedulerOutput] = deque()
        self._arrived: dict[str, bytes] = {}  # KV of requests that moved here and are not admitted yet
        self.leaving: dict[str, bytes] = {}  # KV of requests that another engine is to go on with

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.snapshot()

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        seed: int | None = None,
        handoff: bool = False,
        given: Sequence[int] = (),
        kv: bytes | None = None,
    ) -> None:
        """Queue a request; see `Scheduler.add` for what it raises. seed: of its random streams, unless
        `params.seed` is set. handoff: only up to its first token, then its KV is put among the `leaving`. given:
        what another engine has said; kv: what it put among them there, without which KV is computed anew."""
        now = self.clock.now()
        chosen = params.seed if params.seed is not None else (seed or 0)
        moves = {"handoff": handoff, "given": given, "moved": kv is not None}
        self.scheduler.add(
            request_id,
            prompt_token_ids,
            params,
            now,
            priority=priority,
            cache_salt=cache_salt,
            seed=chosen,
            **moves,  # type: ignore[arg-type]
        )
        if kv is not None:
            self._arrived[request_id] = kv
        if self._log is not None:
            self._log.add(now, request_id, prompt_token_ids, params, priority, cache_salt, chosen, moves)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]:
        now = self.clock.now()
        outputs = self.scheduler.abort(request_id, index, now)
        self._arrived.pop(request_id, None)
        if self._log is not None:
            self._log.abort(now, request_id, index)
        return outputs

    def step(self) -> list[SequenceOutput]:
        """Submit what can be submitted, then commit the oldest step in flight. [] when there was nothing."""
        self.last_step = None
        while len(self._submitted) < self.executor.max_in_flight:
            now = self.clock.now()
            out = self.scheduler.schedule(now)
            if out.empty:
                break
            if self._log is not None:
                self._log.schedule(now, out)
            for moved in out.received:
                assert isinstance(self.executor, MovesPages)
                moved.kv = self._arrived.pop(moved.id)
            self.executor.submit(out)
            self._submitted.append(out)
        if not self._submitted:
            return []
        result = self.executor.collect()
        self.clock.elapse(result.seconds)
        now = self.clock.now()
        out = self._submitted.popleft()
        outputs = self.scheduler.update(out, result, now)
        for request_id, entries in self.scheduler.handed:  # before their pages are given to others
            assert isinstance(self.executor, MovesPages)
            self.leaving[request_id] = self.executor.read_pages(entries)
        self.scheduler.handed.clear()
        if self._log is not None:
            self._log.result(now, result)
        self.last_step = out
        return outputs

    def fly(self, outs: Sequence[SchedulerOutput]) -> None:
        """The steps in flight are now these: a simulator has taken several at once (macro.take_turns)."""
        self._submitted = deque(outs)

    def run_trace(self, arrivals: Iterable[Arrival]) -> Iterator[SequenceOutput]:
        """Drive a whole trace, sorted by `at`, and yield every output. Works on either clock."""
        start = self.clock.now()
        queue = deque(arrivals)
        while queue or self.has_work:
            while queue and start + queue[0].at <= self.clock.now():
                a = queue.popleft()
                self.add(
                    a.id,
                    a.prompt_token_ids,
                    a.params,
                    priority=a.priority,
                    cache_salt=a.cache_salt,
                    seed=a.seed,
                )
            if self.has_work:
                yield from self.step()
            elif queue:
                self.clock.wait_until(start + queue[0].at)
