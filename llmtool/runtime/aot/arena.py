"""One arena for all intermediate buffers of a step, safe in every order the schedule leaves open. No torch.

Two buffers may share bytes iff every task that touches one of them precedes the first write of the other in the
scheduled partial order. In one stream that order is total and the plan is the usual one by lifetimes; with more
streams it keeps apart what two of them may hold at once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from llmtool.runtime.aot.order import Order, members
from llmtool.runtime.aot.tasks import Task

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Buffer:
    """nbytes; the task that first writes it; a bit set of all tasks that touch it, that one too.

    kept: it is read after the last task, so nothing may follow it in its bytes."""

    nbytes: int
    writer: int
    users: int
    kept: bool = False


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """offsets: one per buffer. nbytes: of the arena; no_reuse: of all buffers side by side; least: no plan for this
    order has fewer, since so many bytes are live at one task."""

    offsets: tuple[int, ...]
    nbytes: int
    no_reuse: int
    least: int


def buffers_of(tasks: Sequence[Task], nbytes: dict[int, int], kept: frozenset[int]) -> dict[int, Buffer]:
    """The buffers of `nbytes`, id -> bytes, as tasks in program order touch them; those untouched are left out."""
    writer: dict[int, int] = {}
    users: dict[int, int] = {}
    for i, task in enumerate(tasks):
        for buffer in task.reads | task.writes:
            if buffer in nbytes:
                writer.setdefault(buffer, i)
                users[buffer] = users.get(buffer, 0) | 1 << i
    return {b: Buffer(nbytes[b], writer[b], users[b], b in kept) for b in sorted(users)}


def plan_arena(buffers: Sequence[Buffer], schedule: Order, alignment: int = ALIGNMENT) -> ArenaPlan:
    """Offsets, the smallest arena of three greedy placements (by size, by size times lifetime, by first write)."""
    sizes = [-(-max(1, b.nbytes) // alignment) * alignment for b in buffers]
    conflicts = conflicting(buffers, schedule)
    span = [b.users.bit_length() - b.writer if not b.kept else len(schedule) - b.writer for b in buffers]
    every = range(len(buffers))
    placements = (
        sorted(every, key=lambda i: (-sizes[i], buffers[i].writer, i)),
        sorted(every, key=lambda i: (-sizes[i] * span[i], i)),
        sorted(every, key=lambda i: (buffers[i].writer, -sizes[i], i)),
    )
    best: list[int] = []
    least_top = -1
    for placement in placements:
        offsets = _place(placement, sizes, conflicts)
        top = max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)
        if least_top < 0 or top < least_top:
            best, least_top = offsets, top
    return ArenaPlan(tuple(best), max(0, least_top), sum(sizes), _live(buffers, sizes, schedule))


def conflicting(buffers: Sequence[Buffer], schedule: Order) -> list[int]:
    """For each buffer a bit set of those that it may not share bytes with, itself left out."""
    # done[i]: the buffers that nothing touches any more once task i may begin.
    started = [schedule.before[b.writer] for b in buffers]
    result = [0] * len(buffers)
    for i, a in enumerate(buffers):
        for j in range(i):
            b = buffers[j]
            a_first = not a.kept and a.users & ~started[j] == 0
            b_first = not b.kept and b.users & ~started[i] == 0
            if not a_first and not b_first:
                result[i] |= 1 << j
                result[j] |= 1 << i
    return result


def _place(placement: Sequence[int], sizes: Sequence[int], conflicts: Sequence[int]) -> list[int]:
    """Best fit: each buffer in the narrowest gap between those it conflicts with, or above them."""
    offsets = [-1] * len(sizes)
    placed: list[tuple[int, int]] = []  # (offset, buffer), ascending
    for i in placement:
        best, narrowest, top = -1, -1, 0
        for offset, j in placed:
            if not conflicts[i] >> j & 1:
                continue
            gap = offset - top
            if gap >= sizes[i] and (best < 0 or gap < narrowest):
                best, narrowest = top, gap
            top = max(top, offset + sizes[j])
        offsets[i] = top if best < 0 else best
        insort(placed, (offsets[i], i))
    return offsets


def _live(buffers: Sequence[Buffer], sizes: Sequence[int], schedule: Order) -> int:
    """The most bytes that are live at the start of some task in every schedule: first written before it or by it,
    and touched after it or by it."""
    most = 0
    for task in range(len(schedule)):
        upto = schedule.before[task] | 1 << task
        later = schedule.after[task] | 1 << task
        live = sum(
            size
            for b, size in zip(buffers, sizes, strict=True)
            if upto >> b.writer & 1 and (b.kept or b.users & later)
        )
        most = max(most, live)
    return most


def overlaps(plan: ArenaPlan, buffers: Sequence[Buffer], schedule: Order) -> list[tuple[int, int]]:
    """Pairs of buffers that share bytes though they must not: none, by construction."""
    found = []
    for i, bits in enumerate(conflicting(buffers, schedule)):
        for j in members(bits):
            a, b = plan.offsets[i], plan.offsets[j]
            if j < i and a < b + max(1, buffers[j].nbytes) and b < a + max(1, buffers[i].nbytes):
                found.append((j, i))
    return found
