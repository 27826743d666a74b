"""Who waits, who runs, who has ended: the lists behind the scheduler, and the rules that keep them together."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence

from llmtool.core.beam import BeamSearch
from llmtool.core.memory.allocator import Entries, KVAllocator
from llmtool.core.queues import WaitingQueue
from llmtool.core.request import Request, RequestStatus
from llmtool.core.stats import EngineStats


def _order(request: Request) -> tuple[int, float, str, int]:
    return request.sort_key


def is_idle(request: Request) -> bool:
    """Nothing to compute and nothing in flight: a beam that waits for the others of its round."""
    return request.in_flight == 0 and request.num_submitted == len(request.token_ids)


class Roster:
    """Every unfinished sequence is in exactly one place: `waiting`; `running`; `children`, held back until the
    sibling that computes their common prompt is through; or `parked`, beams that gave up their pages while they
    waited for their siblings, and want none before the next round.
    """

    def __init__(self, allocator: KVAllocator, max_seats: int) -> None:
        self.allocator = allocator
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # in scheduling order
        self.groups: dict[str, list[Request]] = {}  # the caller's id -> its sequences
        self.children: dict[str, list[Request]] = {}  # sequence id -> siblings that wait for its prompt
        self.parked: set[Request] = set()
        self.beams: dict[str, BeamSearch] = {}
        self.handed: list[tuple[str, Entries]] = []  # with their KV's place, since they were last looked at
        self.ended: list[str] = []  # since the last step; the executor is told with the next
        self.stats = EngineStats(pages_total=allocator.ledger().pages_total)
        self.max_seats = max_seats
        self._retired: list[Request] = []  # since the last sweep
        self._seats = 0

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.parked) + sum(map(len, self.children.values()))

    # -- coming --------------------------------------------------------------------------------------------

    def enter(self, requests: Sequence[Request]) -> None:
        """A new request's sequences: the first queues up, its siblings wait for it."""
        root = requests[0]
        self.groups[root.group] = list(requests)
        if root.params.beam is not None:
            self.beams[root.group] = BeamSearch(root)
        if len(requests) > 1:
            self.children[root.id] = list(requests[1:])
        self.waiting.push(root)

    def seats_needed(self, request: Request) -> int:
        """A beam search takes all its seats with its first running beam, and keeps them until none runs."""
        search = self.beams.get(request.group)
        if search is None:
            return 1
        return 0 if search.num_running else search.params.width

    def seats_free(self) -> int:
        return self.max_seats - self._seats

    def seats_of(self, requests: Sequence[Request]) -> int:
        """Seats that come free when these running sequences stop; a beam search's when all its beams do."""
        seats = 0
        for group, count in Counter(r.group for r in requests).items():
            search = self.beams.get(group)
            if search is None:
                seats += count
            elif search.num_running == count:
                seats += search.params.width
        return seats

    def run(self, request: Request) -> None:
        """From the queue's head to the running."""
        popped = self.waiting.pop()
        assert popped is request
        self.join(request)

    def join(self, request: Request) -> None:
        """Among the running."""
        self._seats += self.seats_needed(request)
        if request.group in self.beams:
            self.beams[request.group].num_running += 1
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=_order)

    def _leave_seat(self, request: Request) -> None:
        if request.group in self.beams:
            self.beams[request.group].num_running -= 1
        self._seats -= self.seats_needed(request)

    def release_children(self, parent: Request) -> None:
        """The parent's prompt is computed, or will never be: its siblings queue up."""
        for child in self.children.pop(parent.id, ()):
            if not child.finished:
                self.waiting.push(child)

    # -- going ---------------------------------------------------------------------------------------------

    def send_back(self, victim: Request, status: RequestStatus, park: bool) -> None:
        """From the running to the queue, at its old place in line, or to the parked beams."""
        self.running.remove(victim)
        self._leave_seat(victim)
        victim.status = status
        victim.num_sent = 0
        victim.num_preemptions += 1
        self.stats.preemptions += 1
        if park:
            self.parked.add(victim)
        else:
            self.waiting.push(victim)

    def unpark(self, beam: Request) -> None:
        """The next round has begun: a beam that was parked has a token to compute again."""
        if beam in self.parked:
            self.parked.remove(beam)
            self.waiting.push(beam)

    def retire(self, request: Request) -> None:
        """Give a sequence's pages back; the lists forget it in `sweep`. Harmless the second time."""
        if request.finished:
            return
        if request.status == RequestStatus.RUNNING:
            self._leave_seat(request)
        self.waiting.remove(request)
        self.parked.discard(request)
        request.status = RequestStatus.FINISHED
        self.allocator.end(request.id)
        self.ended.append(request.id)
        self._retired.append(request)
        self.release_children(request)

    def sweep(self) -> None:
        """Forget what has ended since the last sweep; costs what has ended, not what waits."""
        if not self._retired:
            return
        self.running = [r for r in self.running if r.status != RequestStatus.FINISHED]
        for group in {request.group for request in self._retired}:
            if all(r.finished for r in self.groups[group]):
                del self.groups[group]
                self.beams.pop(group, None)
        self._retired.clear()

    def count_pages(self) -> None:
        """Called when a step holds all the pages it will hold."""
        self.stats.pages_peak = max(self.stats.pages_peak, self.allocator.usage()[0])

    # -- looking in ----------------------------------------------------------------------------------------

    def snapshot(self) -> EngineStats:
        self.stats.num_running = len(self.running)
        self.stats.num_waiting = self.num_waiting
        self.stats.pages_used, self.stats.pages_cached = self.allocator.usage()
        return self.stats

    def check(self) -> None:
        """Assert that the lists agree with each other."""
        members = [r for group in self.groups.values() for r in group if not r.finished]
        waiting = [r for r in members if r in self.waiting]
        held = [r for children in self.children.values() for r in children if not r.finished]
        held += self.parked
        assert all(r.status not in (RequestStatus.RUNNING, RequestStatus.FINISHED) for r in waiting + held)
        assert all(r.status == RequestStatus.RUNNING for r in self.running)
        places = sorted(r.id for r in [*waiting, *self.running, *held])
        assert sorted(r.id for r in members) == places, "every sequence in one place"
        assert len(waiting) == len(self.waiting)
        assert self.running == sorted(self.running, key=_order)
        seats = sum(1 for r in self.running if r.group not in self.beams)
        seats += sum(search.params.width for search in self.beams.values() if search.num_running)
        for group, search in self.beams.items():
            assert search.num_running == sum(1 for r in self.running if r.group == group)
        assert seats == self._seats <= self.max_seats
        assert all(r.num_computed <= r.num_submitted <= len(r.token_ids) for r in self.running)
