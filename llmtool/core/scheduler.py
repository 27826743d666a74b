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

from collections import deque
from collections.abc import Sequence

from llmtool.config import SchedulerConfig
from llmtool.core.admission import Admission
from llmtool.core.commit import Committer
from llmtool.core.memory.allocator import Entries, Extension, Handover, KVAllocator, OutOfPages
from llmtool.core.memory.geometry import STATES
from llmtool.core.ports import (
    Drafts,
    DraftTree,
    NewRequest,
    Received,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
)
from llmtool.core.request import FinishReason, Request, RequestStatus, SamplingParams, SequenceOutput
from llmtool.core.roster import Roster, is_idle
from llmtool.core.stats import EngineStats, SpecCounters
from llmtool.errors import RequestError

SEATS = "seats"  # what is short when max_num_seqs run; otherwise it is a page type


class Scheduler:
    """config: limits and policies. allocator: KV memory. eos_token_ids: the model's ends of sequence. drafts: where
    they come from; None is no speculation, and for layers with a state there is none whatever is given."""

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: KVAllocator,
        eos_token_ids: Sequence[int] = (),
        drafts: Drafts | None = None,
    ) -> None:
        self.config = config
        self.allocator = allocator
        self.eos_token_ids = frozenset(eos_token_ids)
        self._roster = Roster(allocator, config.max_num_seqs)
        self._admission = Admission(config, allocator, self.eos_token_ids)
        self._committer = Committer(self._roster)
        self._submitted: deque[tuple[SchedulerOutput, list[Request]]] = deque()
        self._step_id = 0
        # A recurrent state cannot be rolled back: it has gone over the tokens that were wrong.
        states = any(layer.kind in STATES for group in allocator.groups for layer in group.layers)
        self._drafts, self._states = None if states else drafts, states
        self._drafted = 0  # draft tokens of the last step

    # -- requests come and go ------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._roster.groups or self._submitted or self._roster.ended)

    def __contains__(self, group: str) -> bool:
        return group in self._roster.groups

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
        handoff: bool = False,
        given: Sequence[int] = (),
        moved: bool = False,
    ) -> None:
        """Take a request. handoff: it ends with its first token, and another engine goes on (`handed`). given: what
        it has said elsewhere; moved: the KV of all tokens but the last comes with it. Raises RequestTooLong if it
        can never fit, QueueFull, RequestError."""
        assert group not in self, f"request id {group!r} is in use"
        assert "/" not in group, "ids with a slash name the further answers of a request"
        if params.spec and self._drafts is None:
            raise self._no_drafts(params.spec)
        requests = self._admission.sequences(
            group, prompt, params, now, priority, cache_salt, seed, handoff, given, moved
        )
        self._admission.check_queue(self._roster.num_waiting + len(self._roster.running), len(requests))
        self._roster.enter(requests)

    def _no_drafts(self, spec: int) -> RequestError:
        if self._states:
            why, remedy = "this model's layers keep a state, which drafts would spoil", "Leave it out."
        else:
            why, remedy = "this server makes none", "Leave it out, or start the server with --spec auto."
        return RequestError(f"spec asks for {spec} draft tokens, but {why}.", remedy, param="spec")

    @property
    def handed(self) -> list[tuple[str, Entries]]:
        """Requests that another engine is to go on with, since this was last cleared, and where their KV lies until
        the next step is decided."""
        return self._roster.handed

    def abort(self, group: str, index: int | None = None, now: float = 0.0) -> list[SequenceOutput]:
        """End a request, or one of its answers, at any moment. Unknown or finished ones are ignored."""
        members = [r for r in self._roster.groups.get(group, ()) if not r.finished]
        if group in self._roster.beams:  # no answers of its own before it ends: it stops as a whole
            members = members[:1]
        elif index is not None:
            members = [r for r in members if r.index == index]
        outputs = [o for r in members for o in self._committer.end(r, FinishReason.ABORT, now)]
        self._roster.sweep()
        return outputs

    def update(self, out: SchedulerOutput, result: StepResult, now: float) -> list[SequenceOutput]:
        """Commit the oldest submitted step. Returns what each answer gained by it."""
        submitted, work = self._submitted.popleft()
        assert submitted is out and result.step_id == out.step_id, "steps are committed in order"
        if self._drafts is not None:
            self._drafts.record(out, result)
        return self._committer.commit(out, work, result, now)

    @property
    def stats(self) -> EngineStats:
        """The counters; `snapshot` also brings its gauges up to date."""
        return self._roster.stats

    def snapshot(self) -> EngineStats:
        """Counters with the gauges of now."""
        stats = self._roster.snapshot()
        if self._drafts is not None:
            stats.spec = stats.spec or SpecCounters()
            self._drafts.count(stats.spec)
        return stats

    def check(self) -> None:
        """Assert our own invariants; cheap enough to run when idle."""
        self.allocator.check()
        self._roster.check()

    # -- schedule ------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Decide the next step. `.empty` when there is nothing to do before a result or a request comes."""
        out = SchedulerOutput(self._step_id, finished=self._roster.ended)
        if self._drafts is not None:
            self._drafts.forget(out.finished)
        work: list[Request] = []
        if self.config.policy == "priority":
            self._admit(out, work, self._budget(out) - self._singles(), now, urgent=True)
        displaced = len(out.preempted)
        budget = self._run(out, work)
        if len(out.preempted) == displaced and budget >= 0:
            self._admit(out, work, budget, now)
        if self._drafts is not None and out.scheduled:
            self._add_drafts(self._drafts, out, work)
        self._roster.count_pages()
        if out.empty:
            return out
        self._roster.ended = []
        self._step_id += 1
        self._submitted.append((out, work))
        return out

    def _budget(self, out: SchedulerOutput) -> int:
        return self.config.max_num_batched_tokens - out.num_tokens

    def _singles(self) -> int:
        """Running sequences that want one token."""
        return sum(1 for r in self._roster.running if len(r.token_ids) - r.num_submitted == 1)

    def _run(self, out: SchedulerOutput, work: list[Request]) -> int:
        """Give running sequences their tokens. Returns the budget left; -1 if a sequence lacked pages.

        Oldest first, but single tokens are set aside before prompt chunks are cut: a long prompt must not hold
        up those that are decoding.
        """
        admitted = {request.id for request in work}  # ahead of their turn, under the priority policy
        budget = self._budget(out)
        for_chunks = budget - self._singles()
        for_chunks -= min(
            self._drafted, max(0, for_chunks) // 2
        )  # about as many drafts as last time will come
        position, blocked = 0, False
        while position < len(self._roster.running) and budget > 0:
            request = self._roster.running[position]
            position += 1
            pending = len(request.token_ids) - request.num_submitted
            if pending == 0 or request.id in admitted:
                continue  # in flight, or a beam that waits for the others
            count = 1 if pending == 1 else min(pending, for_chunks)
            if count <= 0:
                continue
            try:
                grown = self.allocator.extend(request.id, request.num_submitted + count)
            except OutOfPages:
                if not self._grow(request, request.num_submitted + count, out):
                    blocked = True
                    if self._is_alone(request, out):
                        # Its pages lie scattered among cached ones: begun anew, it has whole large pages.
                        self._preempt(request, out)
                        request.compact = True
                        break
                position = self._roster.running.index(request) + 1  # preempting moved the others
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

    def _is_alone(self, request: Request, out: SchedulerOutput) -> bool:
        """Nothing else runs, is under way or could give up pages."""
        return self._roster.running == [request] and not (self._submitted or out.scheduled)

    def _victim(self, request: Request) -> Request | None:
        """The last in order that no submitted step uses; failing that, an older one that waits for its beams."""
        position = self._roster.running.index(request)
        for other in reversed(self._roster.running[position + 1 :]):
            if other.in_flight == 0:
                return other
        return self._idle_beam(self._roster.running[:position])

    @staticmethod
    def _idle_beam(candidates: Sequence[Request]) -> Request | None:
        for other in reversed(candidates):
            if is_idle(other):
                return other
        return None

    def _preempt(self, victim: Request, out: SchedulerOutput) -> None:
        assert victim.in_flight == 0
        copies, idle = None, is_idle(victim)
        # Host pages freed by this step's swap-ins are read by it: no swapping out before the next.
        if self.config.preemption == "swap" and not out.swap_in:
            copies = self.allocator.swap_out(victim.id)
        if copies is None:
            self.allocator.preempt(victim.id)
            victim.num_submitted = victim.num_computed = 0
            victim.prompt_logprobs.clear()
        else:
            out.swap_out.extend(copies)
            self._roster.stats.swapped_pages += len(copies)
        status = RequestStatus.PREEMPTED if copies is None else RequestStatus.SWAPPED
        self._roster.send_back(victim, status, park=idle)
        out.preempted.append(victim.id)

    def _admit(
        self, out: SchedulerOutput, work: list[Request], budget: int, now: float, urgent: bool = False
    ) -> None:
        """Let waiting sequences in, in order, while seats, pages and budget last. urgent: only those that outrank
        a running one, which they may displace."""
        while budget > 0 and (request := self._roster.waiting.peek()) is not None:
            if urgent and not (self._roster.running and self._roster.running[-1].priority > request.priority):
                break
            try:
                if self._roster.seats_needed(request) > self._roster.seats_free():
                    raise OutOfPages(self._roster.seats_needed(request), self._roster.seats_free(), SEATS)
                grown = self._start(request, budget, out)
            except OutOfPages as lack:
                if self._displace(request, lack, out) if urgent else self._unblock(out):
                    continue
                break
            self._roster.run(request)
            if request.first_scheduled < 0:
                request.first_scheduled = now
            count = min(budget, len(request.token_ids) - request.num_submitted)
            budget -= count
            self._submit(request, count, grown, out, work)

    def _displace(self, request: Request, lack: OutOfPages, out: SchedulerOutput) -> bool:
        """Preempt the last sequence of lower priority, if doing so to all of them would let `request` in."""
        lower = [r for r in self._roster.running if r.priority > request.priority and r.in_flight == 0]
        if lack.binding == SEATS:
            gain = self._roster.seats_of(lower)
        else:
            gain = sum(self.allocator.would_free(r.id) for r in lower)
        if not lower or lack.have + gain < lack.needed:
            return False
        self._preempt(lower[-1], out)
        return True

    def _unblock(self, out: SchedulerOutput) -> bool:
        """Nothing runs and the queue is stuck: beams that wait for a sibling in the queue hold the pages."""
        victim = None if out.scheduled or self._submitted else self._idle_beam(self._roster.running)
        if victim is None:
            return False
        self._preempt(victim, out)
        return True

    def _start(self, request: Request, budget: int, out: SchedulerOutput) -> Extension | None:
        """Give an admitted sequence its first pages. Raises OutOfPages, and nothing is changed."""
        # Running sequences will want their next pages soon. Half a page each is within 2 % of the best throughput
        # on chat-like and instruction-like lengths; none costs 5 % in preemptions, a whole one idles pages.
        headroom = self.allocator.headroom(len(self._roster.running))
        known = len(request.token_ids)
        if request.status == RequestStatus.SWAPPED:
            if self.allocator.available() < self.allocator.pages_for(known) + headroom:
                raise OutOfPages(
                    self.allocator.pages_for(known) + headroom, self.allocator.available(), "swap"
                )
            target = min(known, request.num_submitted + budget)
            copies = self.allocator.swap_in(request.id, target)
            out.swap_in.extend(copies)
            self._roster.stats.swapped_pages += len(copies)
            return self.allocator.extend(request.id, target)
        if request.moved:
            return self._receive(request, budget, headroom, out)
        parent = request.parent
        if request.status == RequestStatus.WAITING and parent is not None and self._can_fork(parent, request):
            shared = request.num_prompt_tokens - 1
            if self.allocator.available() < headroom + 2:
                raise OutOfPages(headroom + 2, self.allocator.available(), "fork")
            self.allocator.fork(parent.id, request.id, request.token_ids, shared)
            try:
                grown = self.allocator.extend(request.id, min(known, shared + budget))
            except OutOfPages:  # pages of one type are not those of another
                self.allocator.preempt(request.id)
                raise
            request.num_submitted = request.num_cached = shared
            return grown
        reuse = request.params.prompt_logprobs is None or request.num_output_tokens > 0
        reuse = reuse and not request.compact
        cached = self.allocator.begin(
            request.id,
            request.token_ids,
            budget,
            salt=request.cache_salt,
            headroom=headroom,
            reuse=reuse,
            hints=request.params.cache_hints,
        )
        request.num_submitted, request.compact = cached, False
        if request.num_preemptions == 0:
            request.num_cached = cached
            self._roster.stats.prefix_queries += known
            self._roster.stats.prefix_hits += cached
        return None

    def _receive(
        self, request: Request, budget: int, headroom: int, out: SchedulerOutput
    ) -> Extension | None:
        """Admit a sequence whose KV comes from another engine."""
        assert isinstance(self.allocator, Handover)
        count = request.moved
        entries = self.allocator.receive(
            request.id, request.token_ids, count, salt=request.cache_salt, headroom=headroom
        )
        try:
            grown = self.allocator.extend(request.id, min(len(request.token_ids), count + budget))
        except OutOfPages:
            self.allocator.preempt(request.id)
            raise
        out.received.append(Received(request.id, entries))
        request.num_submitted = request.num_computed = count
        request.moved = 0
        return grown

    def _can_fork(self, parent: Request, child: Request) -> bool:
        # Computed, not only submitted: a copied page must have been written by an earlier step than the copy.
        if parent.status != RequestStatus.RUNNING or parent.num_computed < child.num_prompt_tokens:
            return False
        return self.allocator.can_fork(parent.id, child.num_prompt_tokens - 1)

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
            self._roster.stats.copied_pages += len(grown.copies)
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
            entry.keep_pages = request.kept_pages
        request.kept_pages = ()
        request.num_sent = known
        request.num_submitted = end
        request.in_flight += 1
        self.allocator.advance(request.id, end)
        out.scheduled.append(entry)
        out.num_tokens += count
        work.append(request)

    # -- drafts --------------------------------------------------------------------------------------------

    def _add_drafts(self, drafts: Drafts, out: SchedulerOutput, work: list[Request]) -> None:
        """Let decoding sequences verify drafts, as far as the budget and pages that nobody else wanted go."""
        decoding = [
            i
            for i, (entry, request) in enumerate(zip(out.scheduled, work, strict=True))
            if entry.sample and entry.num_tokens == 1 and request.params.beam is None
        ]
        planned = drafts.plan(out, decoding, work, self._budget(out))
        self._drafted = 0
        for i, draft in zip(decoding, planned, strict=True):
            tokens = draft.tokens if isinstance(draft, DraftTree) else draft
            if tokens:
                count = self._add_draft(out.scheduled[i], work[i], tokens, out)
                self._drafted += count
                if isinstance(draft, DraftTree):  # each follows one before it: the first ones are a tree too
                    out.scheduled[i].parents = tuple(draft.parents[:count])

    def _add_draft(
        self, entry: ScheduledRequest, request: Request, tokens: Sequence[int], out: SchedulerOutput
    ) -> int:
        """Returns how many of `tokens` there is room for. Nobody is preempted for a draft."""
        known = entry.start + 1
        count = len(tokens)
        while count and not self.allocator.can_extend(request.id, known + count, drafts=True):
            count -= 1
        if not count:
            return 0
        grown = self.allocator.extend(request.id, known + count, drafts=True)
        if grown is not None:
            out.copies.extend(grown.copies)
            self._roster.stats.copied_pages += len(grown.copies)
            before = entry.new_pages or [()] * len(grown.new_pages)
            entry.new_pages = [(*a, *b) for a, b in zip(before, grown.new_pages, strict=True)]
            entry.table_edits = (*entry.table_edits, *grown.edits)
        entry.draft = tuple(tokens[:count])
        entry.num_tokens += count
        out.num_tokens += count
        return count
