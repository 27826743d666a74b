"""Which of several equal engines gets a request: the same rules for serving and for planning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from llmtool.errors import UsageError


class Router(Protocol):
    """needs_load: whether `pick` looks at the engines' load, so that a simulator must bring them up to date
    first."""

    needs_load: bool

    def pick(self, loads: Sequence[int]) -> int:
        """The engine for the next request. loads: requests that each has and has not ended."""
        ...


class RoundRobin:
    """One after the other."""

    needs_load = False

    def __init__(self) -> None:
        self._next = 0

    def pick(self, loads: Sequence[int]) -> int:
        chosen = self._next % len(loads)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """The engine with the fewest unfinished requests; the first of equals."""

    needs_load = True

    def pick(self, loads: Sequence[int]) -> int:
        return min(range(len(loads)), key=lambda i: (loads[i], i))


ROUTERS: Mapping[str, Callable[[], Router]] = {"round-robin": RoundRobin, "least-loaded": LeastLoaded}


def make_router(name: str) -> Router:
    """Raises UsageError for an unknown name."""
    if name not in ROUTERS:
        raise UsageError(f"The router {name!r} is unknown.", f"Known: {', '.join(ROUTERS)}.")
    return ROUTERS[name]()
