"""Which of several equal engines gets a request: the same rules for serving and for planning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from llmtool.core.memory.hashing import page_hash, root_hash
from llmtool.errors import UsageError

Loads = Sequence[int | None]
"""Requests that each engine has and has not ended; None for one that takes none now. At least one is a number."""

BLOCK = 32  # tokens of a prompt that are looked up together
REMEMBERED = 1 << 16  # blocks of each engine: what a cache has lost by then, a router should forget
SLACK = 4  # requests by which an engine may be ahead of the least loaded, and still get what it knows ...
SHARE = 0.5  # ... and this part of the least load besides


class Router(Protocol):
    """needs_load: whether `pick` looks at the engines' load, so that a simulator must bring them up to date
    first."""

    needs_load: bool

    def pick(self, loads: Loads, prompt: Sequence[int] = (), salt: str = "") -> int:
        """The engine for the next request, with these prompt tokens; salt: prompts of different ones share no
        KV."""
        ...

    def forget(self, engine: int) -> None:
        """An engine has begun anew, its cache is empty."""
        ...


class RoundRobin:
    """One after the other."""

    needs_load = False

    def __init__(self) -> None:
        self._next = 0

    def pick(self, loads: Loads, prompt: Sequence[int] = (), salt: str = "") -> int:
        chosen = self._next % len(loads)
        while loads[chosen] is None:
            chosen = (chosen + 1) % len(loads)
        self._next = chosen + 1
        return chosen

    def forget(self, engine: int) -> None:
        pass


class LeastLoaded:
    """The engine with the fewest unfinished requests; the first of equals."""

    needs_load = True

    def pick(self, loads: Loads, prompt: Sequence[int] = (), salt: str = "") -> int:
        return min((load, i) for i, load in enumerate(loads) if load is not None)[1]

    def forget(self, engine: int) -> None:
        pass


class PrefixAware:
    """The engine that has been sent most of the prompt's beginning, of those that are not far ahead in load: their
    prefix caches should hold it. Of equals the least loaded, then the first.

    Loads differ by at most SLACK + SHARE * the least, whatever prompts say: one prefix that all requests share must
    not end up on one engine. Remembers REMEMBERED blocks of each engine, the least recently sent go first.
    """

    needs_load = True

    def __init__(self) -> None:
        self._sent: dict[int, OrderedDict[bytes, None]] = {}

    def pick(self, loads: Loads, prompt: Sequence[int] = (), salt: str = "") -> int:
        blocks = list(_blocks(prompt, salt))
        least = min(load for load in loads if load is not None)
        limit = least + SLACK + SHARE * least
        chosen = min(
            (-self._known(i, blocks), load, i)
            for i, load in enumerate(loads)
            if load is not None and load <= limit
        )[2]
        self._note(chosen, blocks)
        return chosen

    def forget(self, engine: int) -> None:
        self._sent.pop(engine, None)

    def _known(self, engine: int, blocks: Sequence[bytes]) -> int:
        sent = self._sent.get(engine, ())
        return next((n for n, block in enumerate(blocks) if block not in sent), len(blocks))

    def _note(self, engine: int, blocks: Sequence[bytes]) -> None:
        sent = self._sent.setdefault(engine, OrderedDict())
        for block in reversed(blocks):  # a prefix is of use without what follows, and not the other way round
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > REMEMBERED:
            sent.popitem(last=False)


def _blocks(prompt: Sequence[int], salt: str) -> Iterator[bytes]:
    """Names of the prompt's whole blocks, each with all that comes before it."""
    parent = root_hash(salt)
    for end in range(BLOCK, len(prompt) + 1, BLOCK):
        parent = page_hash(parent, prompt[end - BLOCK : end])
        yield parent


ROUTERS: Mapping[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-aware": PrefixAware,
}


def make_router(name: str) -> Router:
    """Raises UsageError for an unknown name."""
    if name not in ROUTERS:
        raise UsageError(f"The router {name!r} is unknown.", f"Known: {', '.join(ROUTERS)}.")
    return ROUTERS[name]()
