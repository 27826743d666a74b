"""One engine of a deployment on a virtual clock: the scheduler and allocator of `serve`, PlanCost for kernels."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Engine
from llmtool.core.macro import Turns, advance, quiet_steps, quiet_turns, take_turns
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import SchedulerOutput, StepResult, VirtualClock
from llmtool.core.request import SamplingParams, SequenceOutput
from llmtool.core.scheduler import Scheduler
from llmtool.core.stats import EngineStats
from llmtool.errors import InfeasibleError
from llmtool.sim.deployment import Deployment
from llmtool.sim.drafts import TOKEN, speculator_of
from llmtool.sim.memory import DeviceMemory
from llmtool.sim.stepcost import Batch, PlanCost

_MACRO = 4096  # quiet steps taken in one call at most


@dataclass(frozen=True, slots=True)
class SimRequest:
    """at: seconds after the start. prompt: tokens, ids for the prefix cache; output: tokens to generate. prefilled:
    the prompt's KV comes from elsewhere, and costs nothing to have."""

    id: str
    at: float
    prompt: Sequence[int]
    output: int


@dataclass(slots=True)
class Finished:
    """Moments of one request on the simulation's clock, seconds."""

    id: str
    arrival: float
    first_scheduled: float
    first_token: float
    finished: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class StepTotals:
    """What an engine has done: for utilisation, and for the timeline."""

    steps: int = 0
    busy: float = 0.0
    decodes: int = 0  # sequence-steps with one token
    decode_context: int = 0
    prompt_tokens: int = 0
    prompt_pairs: float = 0.0  # (query, key) pairs of prompt chunks
    prompt_steps: int = 0
    peak_seqs: int = 0  # most in one step
    peak_tokens: int = 0
    timeline: list[tuple[float, float, int, int, int]] = field(default_factory=list)


class PlanExecutor:
    """Steps take what PlanCost says; in a pipeline a step enters a stage when the step before it has left.

    record: keep (start, seconds, decoding sequences, prompt tokens, steps) of every step. prefilled: prompts of
    sequences seen for the first time cost nothing (decode engines of a disaggregated plan).
    """

    def __init__(
        self, cost: PlanCost, clock: VirtualClock, record: bool = False, prefilled: bool = False
    ) -> None:
        self.max_in_flight = cost.deployment.plan.pp
        self.totals = StepTotals()
        self.last: Batch | None = None
        self._cost = cost
        self._clock = clock
        self._record = record
        self._prefilled = prefilled
        self._free = [0.0] * self.max_in_flight  # when each stage can take the next step
        self._done = 0.0
        self._queue: deque[tuple[StepResult, float]] = deque()
        self._arrived: dict[str, bool] = {}

    def submit(self, out: SchedulerOutput) -> None:
        for new in out.new:
            self._arrived[new.id] = new.id not in self._arrived and self._prefilled
        batch, tokens = Batch(), []
        for entry in out.scheduled:
            end = entry.start + entry.num_tokens
            if entry.num_tokens == 1 and entry.start:
                batch.decodes += 1
                batch.decode_context += end
            elif entry.draft:  # like so many sequences, but their context is read once
                batch.decodes += entry.num_tokens
                batch.decode_context += end
            elif self._prefilled and self._arrived.get(entry.id):
                self._arrived[entry.id] = not entry.sample
            else:
                batch.chunks.append((entry.num_tokens, entry.start))
            batch.samples += entry.sample + len(entry.draft)
            right = next((i for i, t in enumerate(entry.draft) if t != TOKEN), len(entry.draft))
            tokens.append([TOKEN] * (1 + right) if entry.sample else [])
        self.last = batch
        result, done = StepResult(out.step_id, tokens), max(self._done, self._clock.now())
        if out.scheduled:
            result.seconds, done = self._run(batch)
        self._queue.append((result, done))

    def _run(self, batch: Batch) -> tuple[float, float]:
        """What the step takes, and the moment its result is there."""
        cost, now = self._cost, self._clock.now()
        if self.max_in_flight == 1:
            seconds = cost.seconds(batch)
            done = now + seconds
        else:
            start = now
            for stage, free in enumerate(self._free):
                start = self._free[stage] = max(start, free) + cost.stage_seconds(stage, batch)
            done = start + cost.host(batch.decodes + len(batch.chunks))
            seconds = done - now
        self._count(now, done, batch)
        return seconds, done

    def _count(self, now: float, done: float, batch: Batch) -> None:
        t, prompt = self.totals, batch.tokens - batch.decodes
        t.steps += 1
        t.peak_seqs = max(t.peak_seqs, batch.decodes + len(batch.chunks))
        t.peak_tokens = max(t.peak_tokens, batch.decodes + prompt)
        t.busy += done - max(now, self._done)
        t.decodes += batch.decodes
        t.decode_context += batch.decode_context
        if prompt:
            t.prompt_steps += 1
            t.prompt_tokens += prompt
            t.prompt_pairs += sum(c * (s + (c + 1) / 2) for c, s in batch.chunks)
        if self._record:
            t.timeline.append((now, done - now, batch.decodes, prompt, 1))
        self._done = done

    def collect(self) -> StepResult:
        result, done = self._queue.popleft()
        if self.max_in_flight > 1:  # the clock has moved on since the step was submitted
            result.seconds = max(0.0, done - self._clock.now())
        return result

    def quiet(self, n: int, context: int, durations: list[float]) -> None:
        """Steps that were not submitted one by one."""
        t, steps, total = self.totals, len(durations), sum(durations)
        t.steps += steps
        t.peak_seqs = max(t.peak_seqs, n)
        t.peak_tokens = max(t.peak_tokens, n)
        t.busy += total
        t.decodes += n * steps
        t.decode_context += context * steps + n * steps * (steps - 1) // 2
        if self._record:
            t.timeline.append((self._clock.now(), total, n, 0, steps))

    def turns(self, quiet: Turns, until: float) -> tuple[int, list[float]]:
        """Quiet turns of a pipeline that begin before `until`: how many, and when the steps then in flight will be
        done. Moves the clock past them."""
        sizes = [len(members) for members in quiet.batches]
        contexts = [sum(r.num_submitted + 1 for r in members) for members in quiet.batches]
        costs = [(self._cost.host(n), self._cost.decode_stages(n)) for n in sizes]
        dones, count = deque(done for _, done in self._queue), len(sizes)
        t, free, taken = self.totals, self._free, 0
        while taken < quiet.turns and (now := self._clock.now()) < until:
            turn = (taken - 1) % count
            n, context, (host, stages), start = sizes[turn], contexts[turn], costs[turn], now
            for stage, seconds in enumerate(stages(context)):
                at = free[stage]
                start = free[stage] = (start if start > at else at) + seconds
            done = start + host
            t.busy += done - max(now, self._done)
            t.decodes += n
            t.decode_context += context
            if self._record:
                t.timeline.append((now, done - now, n, 0, 1))
            self._done = done
            contexts[turn] = context + n
            dones.append(done)
            self._clock.elapse(max(0.0, dones.popleft() - now))
            taken += 1
        t.steps += taken
        peak = max(sizes)
        t.peak_seqs, t.peak_tokens = max(t.peak_seqs, peak), max(t.peak_tokens, peak)
        return taken, list(dones)

    def fly(self, outs: Sequence[SchedulerOutput], dones: Sequence[float]) -> None:
        """The steps in flight are now these."""
        self._queue.clear()
        for out, done in zip(outs, dones, strict=True):
            self._queue.append((StepResult(out.step_id, [[TOKEN] for _ in out.scheduled]), done))


class Replica:
    """memory: of device_memory. macro: take quiet steps many at once (the outcome is the same)."""

    def __init__(
        self,
        cost: PlanCost,
        memory: DeviceMemory,
        macro: bool = True,
        record: bool = False,
        prefilled: bool = False,
    ) -> None:
        d: Deployment = cost.deployment
        if memory.tokens < d.max_len:
            raise InfeasibleError(
                f"{d.plan}: KV memory holds {memory.tokens} tokens, and a sequence may have {d.max_len}."
            )
        self._allocator = UniformAllocator(memory.group, memory.pages, prefix_caching=d.prefix_caching)
        budget = max(d.budget, d.max_seqs)
        if prefilled:
            budget = max(budget, 16 * d.max_len)
        config = SchedulerConfig(d.max_seqs, budget, d.max_len, 10**9)
        self.clock = VirtualClock()
        self._cost = cost
        self._macro = macro and d.drafting is None  # steps of which each may be another length
        self._executor = PlanExecutor(cost, self.clock, record, prefilled)
        scheduler = Scheduler(config, self._allocator, (), speculator_of(d.drafting))
        self.engine = Engine(scheduler, self._executor, self.clock)
        self._pending: deque[SimRequest] = deque()
        self._sizes: dict[str, tuple[int, int]] = {}
        self.finished: list[Finished] = []

    @property
    def load(self) -> int:
        return len(self._sizes)

    @property
    def totals(self) -> StepTotals:
        return self._executor.totals

    @property
    def stats(self) -> EngineStats:
        return self.engine.scheduler.stats

    @property
    def busy(self) -> bool:
        return bool(self._pending) or self.engine.has_work

    @property
    def next_moment(self) -> float:
        """When the next step would begin; only while busy."""
        if self.engine.has_work:
            return self.clock.now()
        return max(self.clock.now(), self._pending[0].at)

    def add(self, request: SimRequest) -> None:
        """In order of arrival."""
        self._pending.append(request)
        self._sizes[request.id] = (len(request.prompt), request.output)

    def advance(self, until: float, stop_at_finish: bool = False) -> None:
        """Take every step that begins before `until`; with stop_at_finish only up to the first that ends a
        request."""
        ended = len(self.finished)
        while self.busy and self.next_moment < until:
            self._admit()
            if not self.engine.has_work:
                self.clock.wait_until(self._pending[0].at)
                continue
            if not self._quiet(until):
                self._take(self.engine.step())
            if stop_at_finish and len(self.finished) > ended:
                return

    def _admit(self) -> None:
        now = self.clock.now()
        while self._pending and self._pending[0].at <= now:
            request = self._pending.popleft()
            params = SamplingParams(max_tokens=request.output, temperature=0.0, ignore_eos=True)
            # Arrival is when it came, not when the step under way let it in.
            self.engine.scheduler.add(request.id, request.prompt, params, request.at)

    def _quiet(self, until: float) -> bool:
        """Take quiet steps if there are any before `until` and the next arrival."""
        if not self._macro:
            return False
        end = min(until, self._pending[0].at if self._pending else until)
        if self._executor.max_in_flight > 1:
            return self._turns(end)
        scheduler = self.engine.scheduler
        steps = quiet_steps(scheduler, _MACRO)
        if steps < 1:
            return False
        running = scheduler._roster.running
        n, context = len(running), sum(r.num_submitted + 1 for r in running)
        durations, now = [], self.clock.now()
        for seconds in self._cost.decode_run(n, context, steps):
            if now >= end:
                break
            durations.append(seconds)
            now += seconds
        self._executor.quiet(n, context, durations)
        for seconds in durations:  # one by one, so that sums round as they do step by step
            self.clock.elapse(seconds)
        self._take(advance(scheduler, len(durations), TOKEN, self.clock.now()))
        return True

    def _turns(self, end: float) -> bool:
        """The same for a pipeline."""
        scheduler = self.engine.scheduler
        quiet = quiet_turns(scheduler, _MACRO)
        if quiet is None:
            return False
        taken, dones = self._executor.turns(quiet, end)
        outputs, outs = take_turns(scheduler, quiet, taken, TOKEN, self.clock.now())
        self.engine.fly(outs)
        self._executor.fly(outs, dones)
        self._take(outputs)
        return True

    def _take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None and output.times is not None:
                t = output.times
                prompt, made = self._sizes.pop(output.request_id)
                self.finished.append(
                    Finished(
                        output.request_id,
                        t.arrival,
                        t.first_scheduled,
                        t.first_token,
                        t.finished,
                        prompt,
                        made,
                        output.num_cached_tokens,
                    )
                )
