"""Many decode steps at once: what a simulator may do between two events, with the same outcome as one by one.

While every running sequence decodes, none ends, none can be let in and pages suffice, each step gives every running
sequence one token and nothing else. `quiet_steps` says for how many steps that holds, the last of which may end
sequences; `advance` takes them. With several steps in flight (a pipeline) the running sequences are micro-batches
that take turns: `quiet_turns` and `take_turns` are the same for them. Pages are taken in another order than step by
step, which only their numbers show. Only for executors without content: tokens are `token`, as of a rule that no
stop token matches.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llmtool.core.memory.allocator import KVAllocator
from llmtool.core.ports import ScheduledRequest, SchedulerOutput
from llmtool.core.request import FinishReason, Request, SequenceOutput
from llmtool.core.scheduler import Scheduler


def quiet_steps(scheduler: Scheduler, limit: int) -> int:
    """Steps, at most `limit`, in which every running sequence gains one token and nothing else happens but that
    some end with the last; 0 if the next step is not such a one."""
    running = scheduler._roster.running
    if limit < 1 or scheduler._submitted or not _is_plain(scheduler):
        return 0
    steps = limit
    for request in running:
        known = len(request.token_ids)
        decoding = known - request.num_submitted == 1 and known > request.num_prompt_tokens
        if not decoding or request.num_sent == 0 or request.stop_tokens:
            return 0
        left = request.max_tokens - (known - request.num_prompt_tokens)
        if left < steps:
            steps = left
    if steps < 1 or not _queue_is_stuck(scheduler):
        return 0
    return _within_pages(scheduler.allocator, running, steps)


def _is_plain(scheduler: Scheduler) -> bool:
    """Sequences run, each for itself, first come first served, and a step has room for a token of each."""
    roster = scheduler._roster
    if not roster.running or roster.beams or roster.children or roster.parked:
        return False
    config = scheduler.config
    return config.policy == "fcfs" and len(roster.running) <= config.max_num_batched_tokens


def _queue_is_stuck(scheduler: Scheduler) -> bool:
    """Nobody waits, or the first in line cannot enter before a running sequence ends."""
    roster = scheduler._roster
    head = roster.waiting.peek()
    if head is None or roster.seats_free() < 1:
        return True
    allocator = scheduler.allocator
    if getattr(allocator, "prefix_caching", True):
        return False  # a prefix that a running sequence completes may let it in
    headroom = allocator.headroom(len(roster.running))
    return allocator.pages_for(len(head.token_ids)) + headroom > allocator.available()


def _within_pages(allocator: KVAllocator, running: list[Request], steps: int) -> int:
    """The most steps, up to `steps`, for which pages suffice without preempting anyone."""

    def fits(count: int) -> bool:
        return allocator.growth_fits([(r.id, r.num_submitted + count) for r in running])

    if fits(steps):
        return steps
    low, high = 0, steps  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def advance(scheduler: Scheduler, steps: int, token: int, now: float) -> list[SequenceOutput]:
    """Take `steps` quiet steps, the last of which is over at `now`. Returns the last outputs of those that end."""
    roster, allocator = scheduler._roster, scheduler.allocator
    tail = [token] * steps
    ending: list[Request] = []
    for request in roster.running:
        target = request.num_submitted + steps
        allocator.extend(request.id, target)
        request.token_ids.extend(tail)
        allocator.advance(request.id, target)
        request.num_submitted = request.num_computed = target
        request.num_sent = target
        if len(request.token_ids) - request.num_prompt_tokens >= request.max_tokens:
            ending.append(request)
    scheduler._step_id += steps
    roster.stats.steps += steps
    roster.stats.generation_tokens += steps * len(roster.running)
    roster.count_pages()
    return _end(scheduler, ending, token, now)


def _end(scheduler: Scheduler, ending: list[Request], token: int, now: float) -> list[SequenceOutput]:
    outputs = []
    for request in ending:
        output = SequenceOutput(request.group, request.index, (token,))
        scheduler._committer._end(request, FinishReason.LENGTH, now, output)
        outputs.append(output)
    if ending:
        scheduler._roster.sweep()
    return outputs


# -- several steps in flight -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turns:
    """batches: micro-batches in flight, the oldest first, and last the one that is submitted next; each in the
    roster's order. A turn submits one and commits the oldest, which is then the next to be submitted. turns: how
    many go by in which nothing else happens but that some sequences end with the last."""

    batches: list[list[Request]]
    turns: int

    def submitted(self, batch: int, turns: int) -> int:
        """How often a batch is submitted in so many turns: the last of the list first, then in its order."""
        count = len(self.batches)
        return len(range((batch + 1) % count, turns, count))

    def committed(self, batch: int, turns: int) -> int:
        return len(range(batch, turns, len(self.batches)))


def quiet_turns(scheduler: Scheduler, limit: int) -> Turns | None:
    """None if the next turn is not quiet, or there is no batch to submit."""
    if limit < 1 or not _is_plain(scheduler):
        return None
    roster, count = scheduler._roster, len(scheduler._submitted) + 1
    place = {id(r): i for i, (_, work) in enumerate(scheduler._submitted) for r in work}
    batches: list[list[Request]] = [[] for _ in range(count)]
    turns = limit
    for request in roster.running:
        batch = place.get(id(request), count - 1)
        known = len(request.token_ids)
        flying = 0 if batch == count - 1 else 1
        decoding = known - request.num_submitted == 1 - flying and known > request.num_prompt_tokens
        if not decoding or request.num_sent == 0 or request.stop_tokens:
            return None
        if request.in_flight != flying or request.num_computed + flying != request.num_submitted:
            return None  # tokens that it has lost are computed anew, in chunks
        left = request.max_tokens - (known - request.num_prompt_tokens)
        turns = min(turns, batch + (left - 1) * count + 1)
        batches[batch].append(request)
    if not all(batches) or sum(map(len, batches)) != len(place) + len(batches[-1]):
        return None
    if turns < 1 or not _queue_is_stuck(scheduler):
        return None
    # As if every batch were submitted as often as the one that is most often.
    most = _within_pages(scheduler.allocator, roster.running, -(-turns // count))
    turns = min(turns, most * count)
    return Turns(batches, turns) if turns else None


def take_turns(
    scheduler: Scheduler, quiet: Turns, turns: int, token: int, now: float
) -> tuple[list[SequenceOutput], list[SchedulerOutput]]:
    """Take `turns` quiet turns, the last of which is over at `now`. Returns the last outputs of the sequences that
    end, and the steps that are in flight then."""
    roster, allocator, count = scheduler._roster, scheduler.allocator, len(quiet.batches)
    ending: list[Request] = []
    for i, batch in enumerate(quiet.batches):
        submitted, committed = quiet.submitted(i, turns), quiet.committed(i, turns)
        tail = [token] * committed
        roster.stats.generation_tokens += committed * len(batch)
        for request in batch:
            target = request.num_submitted + submitted
            allocator.extend(request.id, target)
            request.token_ids.extend(tail)
            allocator.advance(request.id, target)
            request.num_submitted = request.num_sent = target
            request.num_computed += committed
            request.in_flight += submitted - committed
            if len(request.token_ids) - request.num_prompt_tokens >= request.max_tokens:
                ending.append(request)
    roster.stats.steps += turns
    roster.count_pages()
    roster.ended = []
    scheduler._step_id += turns
    flying = [quiet.batches[(turns + i) % count] for i in range(count - 1)]
    outs = []
    for i, batch in enumerate(flying):
        entries = [ScheduledRequest(r.id, r.num_submitted - 1, 1, True) for r in batch]
        outs.append(
            SchedulerOutput(scheduler._step_id - len(flying) + i, scheduled=entries, num_tokens=len(batch))
        )
    scheduler._submitted = deque(zip(outs, flying, strict=True))
    return _end(scheduler, ending, token, now), outs
