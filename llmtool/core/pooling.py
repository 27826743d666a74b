"""Pooling: texts in, one vector of each out. The policy and the loop for encoders, which generate nothing.

An encoder reads a text in both directions, so a sequence runs whole and once: no pages, no chunks, no preemption.
What is left of continuous batching is which of the waiting sequences share a step. Order is that of arrival, a
step is filled up to its budget of tokens, and sequences of one length stand side by side, which is what lets
attention run them together without padding.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmtool.config import SchedulerConfig
from llmtool.core.ports import Clock
from llmtool.core.request import FinishReason, RequestTimes, SequenceOutput
from llmtool.core.stats import EngineStats
from llmtool.errors import QueueFull, RequestError, RequestTooLong

SortKey = tuple[int, float, str, int]  # priority, arrival, group, index: a total order


@dataclass(eq=False, slots=True)
class PoolingRequest:
    """One sequence of a request. group: the caller's id; index: which of its inputs. segment: where the second
    text of a pair begins, 0 for a single one."""

    group: str
    index: int
    token_ids: Sequence[int]
    segment: int
    arrival: float
    sort_key: SortKey
    first_scheduled: float = -1.0


@dataclass(slots=True)
class PoolingBatch:
    """One step: whole sequences, shortest first."""

    step_id: int
    requests: list[PoolingRequest]
    num_tokens: int


@dataclass(slots=True)
class PoolingResult:
    """vectors: parallel to PoolingBatch.requests, each float32 in native order. errors: index in the batch ->
    a sentence, for sequences that have none."""

    vectors: list[bytes]
    errors: Mapping[int, str] = field(default_factory=dict)
    seconds: float = 0.0


class PoolingExecutor(Protocol):
    """Runs one batch at a time."""

    def run(self, batch: PoolingBatch) -> PoolingResult: ...


class PoolingScheduler:
    """Which sequences run in the next step. Deterministic: ties go by request id and index."""

    def __init__(self, config: SchedulerConfig) -> None:
        """max_num_batched_tokens must hold the longest sequence. max_waiting counts sequences."""
        assert config.max_num_batched_tokens >= config.max_model_len
        self.config = config
        self._heap: list[tuple[SortKey, PoolingRequest]] = []  # aborted ones stay until they come up
        self._open: dict[str, dict[int, PoolingRequest]] = {}  # group -> its unfinished sequences
        self._running = 0
        self._waiting = 0
        self._step_id = 0
        self._stats = EngineStats()

    @property
    def has_work(self) -> bool:
        return self._waiting > 0

    def add(
        self,
        group: str,
        inputs: Sequence[Sequence[int]],
        now: float,
        *,
        segments: Sequence[int] = (),
        priority: int = 0,
    ) -> None:
        """Queue all sequences of a request or none. segments: parallel to inputs, or empty.

        A request may be larger than the queue, but a full queue takes nothing. Raises RequestError,
        RequestTooLong, QueueFull.
        """
        self._check(inputs)
        priority = priority if self.config.policy == "priority" else 0
        members = self._open[group] = {}
        for index, token_ids in enumerate(inputs):
            key = (priority, now, group, index)
            segment = segments[index] if segments else 0
            members[index] = PoolingRequest(group, index, token_ids, segment, now, key)
            heapq.heappush(self._heap, (key, members[index]))
        self._waiting += len(inputs)

    def abort(self, group: str, index: int | None, now: float) -> list[SequenceOutput]:
        """End a request, or one input of it. What is running runs to its end, and nobody hears of it."""
        members = self._open.get(group, {})
        ended = [members[i] for i in (list(members) if index is None else [index]) if i in members]
        return [self._end(request, FinishReason.ABORT, now) for request in ended]

    def schedule(self, now: float) -> PoolingBatch | None:
        """The next step, or None when nothing waits."""
        config, taken, tokens = self.config, list[PoolingRequest](), 0
        while self._heap and len(taken) < config.max_num_seqs:
            request = self._heap[0][1]
            if self._is_open(request):
                if tokens + len(request.token_ids) > config.max_num_batched_tokens:
                    break
                request.first_scheduled = now
                taken.append(request)
                tokens += len(request.token_ids)
            heapq.heappop(self._heap)
        if not taken:
            return None
        self._waiting -= len(taken)
        self._running = len(taken)
        taken.sort(key=lambda r: (len(r.token_ids), r.sort_key))
        self._step_id += 1
        return PoolingBatch(self._step_id - 1, taken, tokens)

    def update(self, batch: PoolingBatch, result: PoolingResult, now: float) -> list[SequenceOutput]:
        """What the step brought, without the sequences that were aborted meanwhile."""
        self._running = 0
        self._stats.steps += 1
        self._stats.prompt_tokens += batch.num_tokens
        outputs = []
        for i, request in enumerate(batch.requests):
            if not self._is_open(request):
                continue
            if i in result.errors:
                output = self._end(request, FinishReason.ERROR, now)
                output.error = result.errors[i]
            else:
                output = self._end(request, FinishReason.STOP, now)
                output.vector = result.vectors[i]
            outputs.append(output)
        return outputs

    def snapshot(self) -> EngineStats:
        self._stats.num_running, self._stats.num_waiting = self._running, self._waiting
        return self._stats

    def check(self) -> None:
        """Assert our own invariants; cheap enough to run when idle."""
        unfinished = sum(len(members) for members in self._open.values())
        assert unfinished == self._waiting + self._running
        assert sum(self._is_open(request) for _, request in self._heap) == self._waiting
        assert all(self._open.values())

    def _check(self, inputs: Sequence[Sequence[int]]) -> None:
        limit = self.config.max_model_len
        if not inputs:
            raise RequestError("There is no input.", param="input")
        for token_ids in inputs:
            if not token_ids:
                raise RequestError("An input has no tokens.", param="input")
            if len(token_ids) > limit:
                raise RequestTooLong(
                    f"An input has {len(token_ids)} tokens, but this model takes {limit}.",
                    "Shorten it, or set truncate_prompt_tokens.",
                    param="input",
                    code="context_length_exceeded",
                )
        room = self.config.max_num_seqs + self.config.max_waiting
        present = self._waiting + self._running
        if present >= room:
            raise QueueFull(
                f"The queue is full: {present} sequences are running or waiting, and the limit is {room}.",
                "Try again later.",
            )

    def _is_open(self, request: PoolingRequest) -> bool:
        return self._open.get(request.group, {}).get(request.index) is request

    def _end(self, request: PoolingRequest, reason: FinishReason, now: float) -> SequenceOutput:
        members = self._open[request.group]
        del members[request.index]
        if not members:
            del self._open[request.group]
        if request.first_scheduled < 0:
            self._waiting -= 1
        elif reason is FinishReason.ABORT:
            self._running -= 1
        self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1
        times = RequestTimes(request.arrival, request.first_scheduled, now, now)
        return SequenceOutput(
            request.group,
            request.index,
            (),
            finish_reason=reason,
            num_prompt_tokens=len(request.token_ids),
            times=times,
        )


class PoolingEngine:
    """An encoder's policy and its executor, on one clock; `Engine` for what generates. One loop owns it."""

    def __init__(self, scheduler: PoolingScheduler, executor: PoolingExecutor, clock: Clock) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.last_step: PoolingBatch | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.snapshot()

    def pool(
        self,
        request_id: str,
        inputs: Sequence[Sequence[int]],
        *,
        segments: Sequence[int] = (),
        priority: int = 0,
    ) -> None:
        """Queue a request; see `PoolingScheduler.add` for what it raises."""
        self.scheduler.add(request_id, inputs, self.clock.now(), segments=segments, priority=priority)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]:
        return self.scheduler.abort(request_id, index, self.clock.now())

    def step(self) -> list[SequenceOutput]:
        """Run one step to its end. [] when there was nothing."""
        batch = self.last_step = self.scheduler.schedule(self.clock.now())
        if batch is None:
            return []
        result = self.executor.run(batch)
        self.clock.elapse(result.seconds)
        return self.scheduler.update(batch, result, self.clock.now())
