"""Requests replayed against one way of handing out memory, by bytes: who runs together, who is thrown out, what is
found again.

All requests wait from the start, in order; the queue is first come first served, and looked at when a sequence has
ended. A step gives every running sequence one token; a prompt is computed in the step that lets its request in.
When memory runs out, the latest to have come in gives up all it has and waits at the head of the queue, to be
computed again. Steps in which nothing can happen are taken at once. Percentiles of the batch are over steps while
somebody waits (afterwards the memory is not what limits), its mean over all: tokens per step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmtool.memprofile.demand import Demand, Floats, Ints
from llmtool.memprofile.prefixes import Prefixes
from llmtool.memprofile.requests import Ask, Segment

_BLOCK = 64  # steps looked at in one call


@dataclass(slots=True)
class Moment:
    """Bytes of the arena during `steps` steps: by layer type, what they took and what of it was read; shared: of
    what was read, counted more than once because several share it. cached: kept for prefixes."""

    steps: int
    batch: int
    taken: Ints
    live: Ints
    shared: int
    cached: int
    waiting: bool


@dataclass(slots=True)
class Replay:
    """p50, p95, peak: sequences in a step while somebody waited, or in all steps if nobody ever did; mean: in all
    steps. never: requests that could not fit alone."""

    name: str
    arena: int
    p50: int = 0
    p95: int = 0
    mean: float = 0.0
    peak: int = 0
    preemptions: int = 0
    hit_rate: float = 0.0
    steps: int = 0
    never: int = 0
    saturated: bool = False
    moments: list[Moment] = field(default_factory=list)

    @property
    def live_share(self) -> float:
        """Part of the arena that held what the next step read, mean over steps."""
        steps = sum(m.steps for m in self.moments)
        return sum(m.steps * (int(m.live.sum()) - m.shared) for m in self.moments) / max(
            1, steps * self.arena
        )

    @property
    def typical(self) -> Moment | None:
        """The longest stretch of steps with the median batch."""
        nearest = sorted(self.moments, key=lambda m: (abs(m.batch - self.p50), not m.waiting, -m.steps))
        return nearest[0] if nearest else None


@dataclass(slots=True)
class _Running:
    index: int
    segments: tuple[Segment, ...]
    order: int


class _Machine:
    def __init__(self, demand: Demand, asks: Sequence[Ask], max_seqs: int, page: int) -> None:
        self.demand, self.asks, self.max_seqs, self.page = demand, asks, max_seqs, page
        self.prefixes = Prefixes(demand)
        self.running: list[_Running] = []
        self.lengths = np.zeros(0, dtype=np.int64)
        self.left = np.zeros(0, dtype=np.int64)
        self.capacity = demand.capacity.astype(np.float64)
        self.done = [0] * len(asks)  # tokens made so far
        self.seen = [False] * len(asks)
        self.result = Replay(demand.name, demand.arena)
        self.looked_up = self.found = self.now = self.count = 0
        # The most on the way: a window that no page begins at takes one page more than at its end.
        self.most = np.maximum.accumulate(demand.table, axis=1)
        alone = [bool((self.most[:, a.length] <= demand.capacity).all()) for a in asks]
        self.result.never = alone.count(False)
        self.next: dict[int, list[int]] = {}
        self.waiting: deque[int] = deque()
        for i, ask in enumerate(asks):
            if not alone[i]:
                continue
            if ask.after is None or not alone[ask.after]:
                self.waiting.append(i)
            else:
                self.next.setdefault(ask.after, []).append(i)
        # Bytes that one sequence grows by with a page: what the scheduler keeps free for half of those that run.
        tall = min(demand.table.shape[1] - 1, 4096)
        self.growth = (demand.table[:, tall] - demand.table[:, tall // 2]) * page / max(1, tall - tall // 2)

    def taken(self, ahead: int = 0) -> Floats:
        """Bytes of running sequences in each partition, `ahead` steps from now."""
        total: Floats = self.demand.table[:, self.lengths + ahead].sum(axis=1) - self.prefixes.saved
        return total

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.max_seqs:
            index = self.waiting[0]
            ask, done = self.asks[index], self.done[self.waiting[0]]
            hits = self.prefixes.match(ask.segments) if self.demand.reusable else 0
            segments = ask.segments if self.demand.reusable else ()
            held = segments[:hits]
            known = ask.prompt + done
            inside = self.prefixes.inside(ask.length)
            need = self.demand.table[:, known + 1] - self.prefixes.shared(held, inside)
            spare = self.growth * (len(self.running) // 2)
            if self.running and (self.taken(1) + need + spare > self.capacity).any():
                return
            self.waiting.popleft()
            if not self.seen[index]:
                cached = sum(s.tokens for s in held) // self.page * self.page
                self.found += min(cached, ask.prompt - 1)
                self.looked_up += ask.prompt
                self.seen[index] = True
            self.prefixes.hold(segments, self.now, inside)
            self.running.append(_Running(index, segments, self.count))
            self.count += 1
            self.lengths = np.append(self.lengths, known)
            self.left = np.append(self.left, ask.output - done)

    def drop(self, at: int, ended: bool) -> None:
        one = self.running.pop(at)
        ask = self.asks[one.index]
        self.done[one.index] = ask.output - int(self.left[at])
        self.lengths, self.left = np.delete(self.lengths, at), np.delete(self.left, at)
        answer = Segment(ask.answer, ask.output) if ended and ask.answer is not None else None
        inside = self.prefixes.inside(ask.length)
        self.prefixes.release(one.segments, self.now, inside, answer if self.demand.reusable else None)
        if ended:
            self.waiting.extend(self.next.get(one.index, ()))
        else:
            self.result.preemptions += 1
            self.waiting.appendleft(one.index)

    def ahead(self, most: int) -> int:
        """Steps, `most` at most, that there is room for without a break."""
        room = self.capacity + self.prefixes.saved
        if (self.most[:, self.lengths + most].sum(axis=1) <= room).all():
            return most
        done = 0
        while done < most:
            block = np.arange(done + 1, min(done + _BLOCK, most) + 1)
            taken = self.demand.table[:, self.lengths[:, None] + block].sum(axis=1)
            short = np.flatnonzero((taken > room[:, None]).any(axis=0))
            if len(short):
                return done + int(short[0])
            done += _BLOCK
        return most

    def step(self) -> None:
        """Steps until a sequence ends or memory runs out."""
        ahead = self.ahead(int(self.left.min()))
        if ahead == 0:
            self.drop(len(self.running) - 1, ended=False)
            return
        self.record(ahead)
        self.lengths += ahead
        self.left -= ahead
        self.now += ahead
        for at in np.flatnonzero(self.left == 0)[::-1]:
            self.drop(int(at), ended=True)

    def record(self, steps: int) -> None:
        ahead = steps // 2  # what the stretch looks like halfway
        at = self.lengths + ahead
        taken, live = self.demand.by_type[:, at].sum(axis=1), self.demand.live[:, at].sum(axis=1)
        used = self.taken(steps)
        self.prefixes.shrink(np.maximum(self.capacity - used, 0.0))
        cached = min(float(self.prefixes.cached.sum()), float(self.demand.arena - self.taken(ahead).sum()))
        saved = int(self.prefixes.saved.sum() * self.demand.alive)
        self.result.moments.append(
            Moment(steps, len(self.running), taken, live, saved, max(0, int(cached)), bool(self.waiting))
        )

    def run(self) -> Replay:
        while self.waiting or self.running:
            self.admit()
            self.step()
        return self.summary()

    def summary(self) -> Replay:
        r = self.result
        r.steps = self.now
        r.hit_rate = self.found / self.looked_up if self.looked_up else 0.0
        r.saturated = any(m.waiting for m in r.moments)
        counted = [m for m in r.moments if m.waiting or not r.saturated]
        if counted:
            steps = np.array([m.steps for m in counted], dtype=np.float64)
            sizes = np.array([m.batch for m in counted], dtype=np.float64)
            order = np.argsort(sizes, kind="stable")
            part = np.cumsum(steps[order]) / steps.sum()
            r.p50, r.p95 = (int(sizes[order][int(np.searchsorted(part, q - 1e-12))]) for q in (0.5, 0.95))
            r.peak = int(sizes.max())
            r.mean = sum(m.steps * m.batch for m in r.moments) / max(1, self.now)
        return r


def replay(demand: Demand, asks: Sequence[Ask], max_seqs: int, page: int = 16) -> Replay:
    """Run all requests to their end. Those that could never fit alone are counted and left out."""
    return _Machine(demand, asks, max_seqs, page).run()
