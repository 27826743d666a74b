"""The waiting queue: a heap in scheduling order that forgets removed requests lazily."""

from __future__ import annotations

import heapq

from llmtool.core.request import Request


class WaitingQueue:
    """Ordered by `Request.sort_key` (priority, arrival, id)."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, str, int], int, Request]] = []
        self._pushed = 0  # a removed request leaves its entry behind: entries must differ, requests cannot
        self._members: set[Request] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def push(self, request: Request) -> None:
        assert request not in self._members
        self._members.add(request)
        self._pushed += 1
        heapq.heappush(self._heap, (request.sort_key, self._pushed, request))

    def peek(self) -> Request | None:
        while self._heap:
            request = self._heap[0][2]
            if request in self._members:
                return request
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Request:
        request = self.peek()
        assert request is not None
        heapq.heappop(self._heap)
        self._members.remove(request)
        return request

    def remove(self, request: Request) -> None:
        self._members.discard(request)
