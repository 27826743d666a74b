"""Many decode steps at once: what a simulator may do between two events, with the same outcome as one by one.

While every running sequence decodes, none ends, none can be let in and pages suffice, each step gives every running
sequence one token and nothing else. `quiet_steps` says for how many steps that holds, the last of which may end
sequences; `advance` takes them. Pages are taken in another order than step by step, which only their numbers show.
Only for executors without content: tokens are `token`, as of a rule that no stop token matches.
"""

from __future__ import annotations

from llmtool.core.memory.allocator import KVAllocator
from llmtool.core.request import FinishReason, Request, SequenceOutput
from llmtool.core.scheduler import Scheduler


def quiet_steps(scheduler: Scheduler, limit: int) -> int:
    """Steps, at most `limit`, in which every running sequence gains one token and nothing else happens but that
    some end with the last; 0 if the next step is not such a one."""
    roster = scheduler._roster
    running = roster.running
    if not running or limit < 1 or scheduler._submitted or roster.beams or roster.children or roster.parked:
        return 0
    if scheduler.config.policy != "fcfs" or len(running) > scheduler.config.max_num_batched_tokens:
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
    outputs = []
    for request in ending:
        output = SequenceOutput(request.group, request.index, (token,))
        scheduler._committer._end(request, FinishReason.LENGTH, now, output)
        outputs.append(output)
    if ending:
        roster.sweep()
    return outputs
