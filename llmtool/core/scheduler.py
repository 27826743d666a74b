"""Continuous batching with chunked prefill, prefix caching, forks and preemption. Two verbs: `schedule` decides
a step, `update` commits its result.

There is no prefill phase and no decode phase: a sequence has tokens and a number of them computed, and a step
gives each some more. `schedule` works on submitted state, so several steps may be in flight; `update` is called
in step order. Everything is deterministic: order is (priority, arrival, id), time and seeds come from outside.

Pages are published to the prefix cache when the step that fills them is *submitted*: executors run steps in
order and write a layer's KV of all sequences before any of them reads it, so requests that arrive together
already share their common prefix.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence

from llmtool.config import SchedulerConfig
from llmtool.core.admission import Admission
from llmtool.core.beam import BeamSearch
from llmtool.core.memory.allocator import Extension, KVAllocator, OutOfPages
from llmtool.core.ports import NewRequest, ScheduledRequest, SchedulerOutput, StepResult
from llmtool.core.queues import WaitingQueue
from llmtool.core.request import (
    FinishReason,
    Request,
    RequestStatus,
    RequestTimes,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)
from llmtool.core.stats import EngineStats

_NOT_ADMITTED = (RequestStatus.WAITING, RequestStatus.PREEMPTED, RequestStatus.SWAPPED)


def _order(request: Request) -> tuple[int, float, str, int]:
    return request.sort_key


class Scheduler:
    """config: limits and policies. allocator: KV memory. eos_token_ids: the model's ends of sequence."""

    def __init__(
        self, config: SchedulerConfig, allocator: KVAllocator, eos_token_ids: Sequence[int] = ()
    ) -> None:
        self.config = config
        self.allocator = allocator
        self.eos_token_ids = frozenset(eos_token_ids)
        self.stats = EngineStats(pages_total=allocator.ledger().pages_total)
        self._admission = Admission(config, allocator, self.eos_token_ids)
        self._waiting = WaitingQueue()
        self._running: list[Request] = []  # in scheduling order
        self._groups: dict[str, list[Request]] = {}  # the caller's id -> its unfinished sequences
        self._children: dict[str, list[Request]] = {}  # n > 1: who waits for this sequence's prompt
        self._beams: dict[str, BeamSearch] = {}
        self._seats = 0  # sequences that may run at once: a beam search holds all its seats from the start
        self._forget: list[str] = []  # finished since the last step; the executor is told with the next
        self._submitted: deque[tuple[SchedulerOutput, list[Request]]] = deque()
        self._step_id = 0

    # -- requests come and go ------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._groups or self._submitted or self._forget)

    def __contains__(self, group: str) -> bool:
        return group in self._groups

    def add(
        self,
        group: str,
        prompt: Sequence[int],
        params: SamplingParams,
        now: float,
        *,
        priority: int = 0,
        cache_salt: str = "",
        seed: int = 0,
    ) -> None:
        """Take a request. Raises RequestTooLong if it can never fit, QueueFull, RequestError."""
        assert group not in self._groups, f"request id {group!r} is in use"
        assert "/" not in group, "ids with a slash name the further answers of a request"
        waiting = len(self._waiting) + sum(map(len, self._children.values()))
        self._admission.check_queue(waiting + len(self._running))
        requests = self._admission.sequences(group, prompt, params, now, priority, cache_salt, seed)
        root = requests[0]
        self._groups[group] = requests
        if params.beam is not None:
            self._beams[group] = BeamSearch(root)
        if len(requests) > 1:
            self._children[root.id] = requests[1:]
        self._waiting.push(root)

    def abort(self, group: str, index: int | None = None, now: float = 0.0) -> list[SequenceOutput]:
        """End a request, or one of its answers, at any moment. Unknown or finished ones are ignored."""
        members = [r for r in self._groups.get(group, ()) if not r.finished]
        if group in self._beams:  # no answers of its own before it ends: it stops as a whole
            members = members[:1]
        elif index is not None:
            members = [r for r in members if r.index == index]
        outputs = [o for request in members for o in self._finish(request, FinishReason.ABORT, now)]
        self._sweep()
        return outputs

    # -- schedule ------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Decide the next step. `.empty` when there is nothing to do before a result or a request comes."""
        out = SchedulerOutput(self._step_id, finished=self._forget)
        work: list[Request] = []
        if self.config.policy == "priority":
            self._displace(out)
        displaced = len(out.preempted)
        budget = self._run(out, work)
        if len(out.preempted) == displaced and budget >= 0:
            self._admit(out, work, budget, now)
        if out.empty:
            return out
        self._forget = []
        self._step_id += 1
        self._submitted.append((out, work))
        return out

    def _run(self, out: SchedulerOutput, work: list[Request]) -> int:
        """Give running sequences their tokens. Returns the budget left; -1 if a sequence lacked pages.

        Oldest first, but single tokens are set aside before prompt chunks are cut: a long prompt must not hold
        up those that are decoding.
        """
        singles = sum(1 for r in self._running if len(r.token_ids) - r.num_submitted == 1)
        budget = self.config.max_num_batched_tokens
        for_chunks = budget - singles
        position, blocked = 0, False
        while position < len(self._running) and budget > 0:
            request = self._running[position]
            position += 1
            pending = len(request.token_ids) - request.num_submitted
            if pending == 0:
                continue  # in flight, or a beam that waits for the others
            count = 1 if pending == 1 else min(pending, for_chunks)
            if count <= 0:
                continue
            try:
                grown = self.allocator.extend(request.id, request.num_submitted + count)
            except OutOfPages:
                if not self._grow(request, request.num_submitted + count, out):
                    blocked = True
                position = self._running.index(request) + 1  # preempting moved the others
                if blocked:
                    continue
                grown = self.allocator.extend(request.id, request.num_submitted + count)
            if pending > 1:
                for_chunks -= count
            budget -= count
            self._submit(request, count, grown, out, work)
        return -1 if blocked else min(budget, max(0, for_chunks))

    def _grow(self, request: Request, target: int, out: SchedulerOutput) -> bool:
        """Preempt others until `request` can grow; False if that does not suffice: older sequences go on, and
        preempt this one when they must."""
        while not self.allocator.can_extend(request.id, target):
            victim = self._victim(request)
            if victim is None:
                return False
            self._preempt(victim, out)
        return True

    def _victim(self, request: Request) -> Request | None:
        """The last in order that no submitted step uses; failing that, an older one that waits for its beams."""
        position = self._running.index(request)
        for other in reversed(self._running[position + 1 :]):
            if other.in_flight == 0:
                return other
        return self._idle_beam(self._running[:position])

    @staticmethod
    def _idle_beam(candidates: Sequence[Request]) -> Request | None:
        for other in reversed(candidates):
            if other.in_flight == 0 and other.num_submitted == len(other.token_ids):
                return other
        return None

    def _displace(self, out: SchedulerOutput) -> None:
        """Under the priority policy the first in the queue takes seats and pages from lower priorities."""
        request = self._waiting.peek()
        if request is None:
            return
        needed = self.allocator.pages_for(len(request.token_ids))
        while self._running:
            last = self._running[-1]
            seats = self._seats + self._seats_needed(request) <= self.config.max_num_seqs
            if last.priority <= request.priority or last.in_flight:
                return
            if seats and self.allocator.available() >= needed + len(self._running):
                return
            self._preempt(last, out)

    def _preempt(self, victim: Request, out: SchedulerOutput) -> None:
        assert victim.in_flight == 0
        self._running.remove(victim)
        copies = None
        # Host pages freed by this step's swap-ins are read by it: no swapping out before the next.
        if self.config.preemption == "swap" and not out.swap_in:
            copies = self.allocator.swap_out(victim.id)
        if copies is None:
            self.allocator.preempt(victim.id)
            victim.status = RequestStatus.PREEMPTED
            victim.num_submitted = victim.num_computed = 0
            victim.prompt_logprobs.clear()
        else:
            victim.status = RequestStatus.SWAPPED
            out.swap_out.extend(copies)
            self.stats.swapped_pages += len(copies)
        victim.num_sent = 0
        victim.num_preemptions += 1
        self._take_seats(victim, -1)
        self.stats.preemptions += 1
        out.preempted.append(victim.id)
        self._waiting.push(victim)

    def _take_seats(self, request: Request, sign: int) -> None:
        if request.group not in self._beams:
            self._seats += sign

    def _admit(self, out: SchedulerOutput, work: list[Request], budget: int, now: float) -> None:
        """Let waiting sequences in, in order, while seats, pages and budget last."""
        while budget > 0 and (request := self._waiting.peek()) is not None:
            seats = self._seats_needed(request)
            if self._seats + seats > self.config.max_num_seqs:
                break
            try:
                grown = self._start(request, budget, out)
            except OutOfPages:
                if self._unblock(out):
                    continue
                break
            self._waiting.pop()
            self._seats += seats
            if request.group in self._beams:
                self._beams[request.group].seated = True
            request.status = RequestStatus.RUNNING
            insort(self._running, request, key=_order)
            if request.first_scheduled < 0:
                request.first_scheduled = now
            count = min(budget, len(request.token_ids) - request.num_submitted)
            budget -= count
            self._submit(request, count, grown, out, work)

    def _unblock(self, out: SchedulerOutput) -> bool:
        """Nothing runs and the queue is stuck: beams that wait for a sibling in the queue hold the pages."""
        victim = None if out.scheduled or self._submitted else self._idle_beam(self._running)
        if victim is None:
            return False
        self._preempt(victim, out)
        return True

    def _seats_needed(self, request: Request) -> int:
        search = self._beams.get(request.group)
        if search is None:
            return 1
        return 0 if search.seated else search.params.width

    def _start(self, request: Request, budget: int, out: SchedulerOutput) -> Extension | None:
        """Give an admitted sequence its first pages. Raises OutOfPages, and nothing is changed."""
        headroom = len(self._running)  # each running sequence will want its next page soon
        known = len(request.token_ids)
        if request.status == RequestStatus.SWAPPED:
            if self.allocator.available() < self.allocator.pages_for(known) + headroom:
                raise OutOfPages(
                    self.allocator.pages_for(known) + headroom, self.allocator.available(), "swap"
                )
            copies = self.allocator.swap_in(request.id)
            out.swap_in.extend(copies)
            self.stats.swapped_pages += len(copies)
            return self.allocator.extend(request.id, min(known, request.num_submitted + budget))
        parent = request.parent
        if request.status == RequestStatus.WAITING and parent is not None and self._can_fork(parent, request):
            shared = request.num_prompt_tokens - 1
            if self.allocator.available() < headroom + 2:
                raise OutOfPages(headroom + 2, self.allocator.available(), "fork")
            self.allocator.fork(parent.id, request.id, request.token_ids, shared)
            request.num_submitted = request.num_cached = shared
            return self.allocator.extend(request.id, min(known, shared + budget))
        reuse = request.params.prompt_logprobs is None or request.num_output_tokens > 0
        cached = self.allocator.begin(
            request.id, request.token_ids, budget, salt=request.cache_salt, headroom=headroom, reuse=reuse
        )
        request.num_submitted = cached
        if request.num_preemptions == 0:
            request.num_cached = cached
            self.stats.prefix_queries += known
            self.stats.prefix_hits += cached
        return None

    @staticmethod
    def _can_fork(parent: Request, child: Request) -> bool:
        # Computed, not only submitted: a copied page must have been written by an earlier step than the copy.
        return parent.status == RequestStatus.RUNNING and parent.num_computed >= child.num_prompt_tokens

    def _release_children(self, parent: Request) -> None:
        """The parent's prompt is computed, or will never be: its siblings queue up."""
        for child in self._children.pop(parent.id, ()):
            if not child.finished:
                self._waiting.push(child)

    def _submit(
        self,
        request: Request,
        count: int,
        grown: Extension | None,
        out: SchedulerOutput,
        work: list[Request],
    ) -> None:
        """Write one sequence's share of the step."""
        start, known = request.num_submitted, len(request.token_ids)
        end = start + count
        entry = ScheduledRequest(request.id, start, count, end == known)
        if grown is not None:
            out.copies.extend(grown.copies)
            self.stats.copied_pages += len(grown.copies)
        if request.num_sent == 0:
            tables = self.allocator.table(request.id)
            tokens = list(request.token_ids)
            out.new.append(
                NewRequest(
                    request.id, tokens, request.num_prompt_tokens, request.params, request.seed, tables
                )
            )
        else:
            if grown is not None:
                entry.new_pages, entry.table_edits = grown.new_pages, grown.edits
            if request.num_sent < known:
                entry.new_token_ids = request.token_ids[request.num_sent :]
        request.num_sent = known
        request.num_submitted = end
        request.in_flight += 1
        self.allocator.advance(request.id, end)
        out.scheduled.append(entry)
        out.num_tokens += count
        work.append(request)

    # -- update --------------------------------------------------------------------------------------------

    def update(self, out: SchedulerOutput, result: StepResult, now: float) -> list[SequenceOutput]:
        """Commit the oldest submitted step. Returns what each sequence gained by it."""
        submitted, work = self._submitted.popleft()
        assert submitted is out and result.step_id == out.step_id, "steps are committed in order"
        outputs: list[SequenceOutput] = []
        logprobs, ended = result.logprobs, False
        for entry, request, tokens in zip(out.scheduled, work, result.tokens, strict=True):
            request.in_flight -= 1
            if request.status == RequestStatus.FINISHED:
                continue
            request.num_computed = entry.start + entry.num_tokens
            if request.id in result.errors:
                outputs.extend(self._finish(request, FinishReason.ERROR, now, result.errors[request.id]))
                ended = True
                continue
            if request.num_output_tokens == 0:
                self._prompt_progress(request, entry, result)
            if not tokens or request.num_computed != len(request.token_ids):
                continue  # a prompt chunk, or a beam that has moved on meanwhile
            given = logprobs.get(request.id, ()) if logprobs else ()
            if request.group in self._beams:
                if self._beams[request.group].report(request, given[0]):
                    outputs.extend(self._select_beams(self._beams[request.group], now))
                    ended = True
                continue
            output = self._append(request, tokens, given, now)
            outputs.append(output)
            ended = ended or output.finish_reason is not None
        if ended:
            self._sweep()
        self.stats.steps += 1
        return outputs

    def _prompt_progress(self, request: Request, entry: ScheduledRequest, result: StepResult) -> None:
        if request.id in result.prompt_logprobs:
            request.prompt_logprobs.extend(result.prompt_logprobs[request.id])
        if request.id in self._children and request.num_computed >= request.num_prompt_tokens:
            self._release_children(request)

    def _append(
        self, request: Request, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], now: float
    ) -> SequenceOutput:
        """New tokens of one sequence, up to where it ends."""
        first = request.num_output_tokens == 0
        output = SequenceOutput(request.group, request.index, tokens, logprobs)
        if first:
            request.first_token = now
            self.stats.prompt_tokens += request.num_prompt_tokens if request.index == 0 else 0
            output.num_prompt_tokens = request.num_prompt_tokens
            output.num_cached_tokens = request.num_cached
            if request.prompt_logprobs:
                output.prompt_logprobs = [None, *request.prompt_logprobs]
        for position, token in enumerate(tokens):
            request.token_ids.append(token)
            if logprobs:
                request.cumulative_logprob += logprobs[position].logprob
            made = len(request.token_ids) - request.num_prompt_tokens
            reason = None
            if token in request.stop_tokens and made >= request.params.min_tokens:
                reason, request.stopped_by = FinishReason.STOP, token
            elif made >= request.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                output.token_ids = tokens[: position + 1]
                output.logprobs = logprobs[: position + 1]
                self._end(request, reason, now, output)
                break
        self.stats.generation_tokens += len(output.token_ids)
        return output

    def _select_beams(self, search: BeamSearch, now: float) -> list[SequenceOutput]:
        """Every beam has reported: fork the survivors, end the others, or end the search."""
        selected = search.select()
        self.stats.generation_tokens += 1
        if search.root.first_token < 0:
            search.root.first_token = now
            self.stats.prompt_tokens += search.root.num_prompt_tokens
        if not selected:
            return self._end_beams(search, now)
        survivors: list[Request] = []
        kept: set[str] = set()
        for continuation in selected:  # fork first: sources must not have grown yet
            source = continuation.source
            survivors.append(self._fork_beam(search, source) if source.id in kept else source)
            kept.add(source.id)
        for beam in search.live:
            if beam.id not in kept:
                self._retire(beam)
        for request, continuation in zip(survivors, selected, strict=True):
            request.token_ids.append(continuation.token)
            request.cumulative_logprob = continuation.cumulative_logprob
        search.live = survivors
        self._groups[search.root.group] = list(survivors)
        return []

    def _fork_beam(self, search: BeamSearch, source: Request) -> Request:
        child = self._admission.child(source, search.next_index)
        search.next_index += 1
        if source.status == RequestStatus.RUNNING:
            self.allocator.fork(source.id, child.id, child.token_ids, source.num_submitted)
            child.num_submitted = child.num_computed = source.num_submitted
            child.status = RequestStatus.RUNNING
            insort(self._running, child, key=_order)
        else:
            child.status, child.num_preemptions = RequestStatus.PREEMPTED, 1
            self._waiting.push(child)
        return child

    def _end_beams(self, search: BeamSearch, now: float) -> list[SequenceOutput]:
        root = search.root
        outputs = []
        for index, hypothesis in enumerate(search.finished[: root.params.n]):
            output = SequenceOutput(root.group, index, hypothesis.token_ids, finish_reason=hypothesis.reason)
            output.cumulative_logprob = hypothesis.cumulative_logprob
            output.num_prompt_tokens, output.num_cached_tokens = root.num_prompt_tokens, root.num_cached
            output.times = RequestTimes(root.arrival, root.first_scheduled, root.first_token, now)
            outputs.append(output)
            self._count_finished(hypothesis.reason)
        for beam in search.live:
            self._retire(beam)
        self._groups[root.group] = []
        return outputs

    # -- ends ----------------------------------------------------------------------------------------------

    def _finish(
        self, request: Request, reason: FinishReason, now: float, error: str | None = None
    ) -> list[SequenceOutput]:
        """End a sequence from outside: abort or error. A beam search ends as a whole, with all its answers."""
        search = self._beams.get(request.group)
        answers = [request.index] if search is None else range(request.params.n)
        outputs = [SequenceOutput(request.group, index, (), error=error) for index in answers]
        for output in outputs:
            self._end(request, reason, now, output)
        for beam in () if search is None else search.live:
            beam.finish_reason = reason
            self._retire(beam)
        return outputs

    def _end(self, request: Request, reason: FinishReason, now: float, output: SequenceOutput) -> None:
        request.finish_reason = reason
        output.finish_reason, output.stop_token = reason, request.stopped_by
        output.num_prompt_tokens, output.num_cached_tokens = request.num_prompt_tokens, request.num_cached
        output.cumulative_logprob = request.cumulative_logprob
        output.times = RequestTimes(request.arrival, request.first_scheduled, request.first_token, now)
        self._count_finished(reason)
        self._retire(request)

    def _count_finished(self, reason: FinishReason) -> None:
        self.stats.finished[reason.value] = self.stats.finished.get(reason.value, 0) + 1

    def _retire(self, request: Request) -> None:
        """Give a sequence's pages back; the lists forget it in `_sweep`. Harmless the second time."""
        if request.finished:
            return
        if request.status == RequestStatus.RUNNING:
            self._take_seats(request, -1)
        self._waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self.allocator.end(request.id, keep=request.finish_reason != FinishReason.ERROR)
        self._forget.append(request.id)
        self._release_children(request)

    def _sweep(self) -> None:
        self._running = [r for r in self._running if r.status != RequestStatus.FINISHED]
        for group in [g for g, members in self._groups.items() if all(r.finished for r in members)]:
            del self._groups[group]
            search = self._beams.pop(group, None)
            if search is not None and search.seated:
                self._seats -= search.params.width

    # -- looking in ----------------------------------------------------------------------------------------

    def snapshot(self) -> EngineStats:
        """Counters with the gauges of now."""
        self.stats.num_running = len(self._running)
        self.stats.num_waiting = len(self._waiting) + sum(map(len, self._children.values()))
        self.stats.pages_used, self.stats.pages_cached = self.allocator.usage()
        return self.stats

    def check(self) -> None:
        """Assert our own invariants; cheap enough to run when idle."""
        self.allocator.check()
        members = [r for group in self._groups.values() for r in group if not r.finished]
        waiting = [r for r in members if r in self._waiting]
        held = [r for children in self._children.values() for r in children if not r.finished]
        assert all(r.status in _NOT_ADMITTED for r in waiting + held)
        assert {r.id for r in members} == {r.id for r in [*waiting, *self._running, *held]}
        assert self._running == sorted(self._running, key=_order)
        seats = sum(1 for r in self._running if r.group not in self._beams)
        seats += sum(s.params.width for s in self._beams.values() if s.seated)
        assert seats == self._seats <= self.config.max_num_seqs
        for r in self._running:
            assert r.num_computed <= r.num_submitted <= len(r.token_ids)
