"""The requests that a memory is profiled with: lengths, and which prefixes they share.

Named workloads draw from published length statistics where there are some (plan.workloads) and from assumptions
said below where there are none. All requests wait from the start, but for those that go on a conversation: they
come when the answer before them has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtool.errors import UsageError
from llmtool.plan.workloads import NAMED, guess_format, named_rows
from llmtool.workload.traces import MOONCAKE_BLOCK, TraceRow, read_trace


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt that others may begin with too. key: equal for equal prefixes up to its end. checkpoint:
    whether the server would keep what makes the prefix usable there: a message's or document's end."""

    key: int
    tokens: int
    checkpoint: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. segments: of its prompt, in order; the rest of `prompt` tokens is its own. answer: key of prompt
    plus output, for those who go on from there. after: index of the request that must end first."""

    prompt: int
    output: int
    segments: tuple[Segment, ...] = ()
    answer: int | None = None
    after: int | None = None

    @property
    def length(self) -> int:
        return self.prompt + self.output


Draw = np.random.Generator


def _lognormal(draw: Draw, mean: float, spread: float, longest: int) -> int:
    return int(np.clip(round(draw.lognormal(np.log(mean) - spread**2 / 2, spread)), 1, longest))


class _Talk:
    """A conversation under construction: every message ends a segment."""

    def __init__(self, keys: Callable[[], int], start: Sequence[Segment] = ()) -> None:
        self._keys = keys
        self.segments = list(start)
        self.last: int | None = None

    def turn(self, asks: list[Ask], message: int, output: int) -> None:
        self.segments.append(Segment(self._keys(), message))
        answer = self._keys()
        prompt = sum(s.tokens for s in self.segments)
        asks.append(Ask(prompt, output, tuple(self.segments), answer, self.last))
        self.last = len(asks) - 1
        self.segments.append(Segment(answer, output))


def _counter() -> Callable[[], int]:
    state = [0]

    def next_key() -> int:
        state[0] += 1
        return state[0]

    return next_key


def _talks(
    count: int, draw: Draw, shared: int, turns: int, lengths: Callable[[Draw], tuple[int, int]]
) -> list[Ask]:
    keys, asks = _counter(), list[Ask]()
    system = Segment(keys(), shared)
    talks = [_Talk(keys, [system]) for _ in range(-(-count // turns))]
    for _ in range(turns):  # first turns first, as they would arrive
        for talk in talks:
            talk.turn(asks, *lengths(draw))
    return asks


def _chat(count: int, draw: Draw) -> list[Ask]:
    """Four turns of ShareGPT's lengths after a system prompt of 400 tokens (assumed)."""
    n = NAMED["chat"]
    return _talks(
        count,
        draw,
        400,
        4,
        lambda d: (
            _lognormal(d, n.mean_input, n.spread_input, n.longest[0]),
            _lognormal(d, n.mean_output, n.spread_output, n.longest[1]),
        ),
    )


def _agent(count: int, draw: Draw) -> list[Ask]:
    """Tools of 6,000 tokens that all share, then ten calls that read 900 tokens and write 150 each (assumed)."""
    return _talks(
        count, draw, 6000, 10, lambda d: (_lognormal(d, 900, 0.8, 8192), _lognormal(d, 150, 0.7, 1024))
    )


def _docqa(count: int, draw: Draw) -> list[Ask]:
    """Eight documents of 8,000 tokens at a time, four questions of 60 on each in random order, answers of 150
    (assumed)."""
    keys, asks = _counter(), list[Ask]()
    while len(asks) < count:
        documents = [Segment(keys(), _lognormal(draw, 8000, 0.3, 16000)) for _ in range(8)]
        for which in draw.permutation(np.repeat(np.arange(8), 4)):
            document, question = documents[which], _lognormal(draw, 60, 0.4, 512)
            asks.append(Ask(document.tokens + question, _lognormal(draw, 150, 0.6, 1024), (document,)))
    return asks[:count]


def _summarize(count: int, draw: Draw) -> list[Ask]:
    """Articles as Vidur has them; nothing is shared."""
    return [Ask(a, b) for a, b in named_rows("summarization", count, int(draw.integers(2**31)))]


WORKLOADS: dict[str, Callable[[int, Draw], list[Ask]]] = {
    "chat": _chat,
    "docqa": _docqa,
    "agent": _agent,
    "summarize": _summarize,
}


def named(name: str, count: int, seed: int = 0) -> list[Ask]:
    """About `count` requests. Raises UsageError for an unknown name."""
    if name not in WORKLOADS:
        raise UsageError(
            f"The workload {name!r} is unknown.", f"Known: {', '.join(WORKLOADS)}; or give --trace FILE."
        )
    return WORKLOADS[name](count, np.random.default_rng(seed))


def traced(path: str | Path, count: int, checkpoint: int = MOONCAKE_BLOCK) -> list[Ask]:
    """The first `count` requests of a trace, at once. checkpoint: tokens between those of its shared prefixes.
    Raises UsageError for a file that cannot be read or has holes."""
    return from_rows(read_trace(guess_format(path), path, count), checkpoint)


def from_rows(rows: Sequence[TraceRow], checkpoint: int = MOONCAKE_BLOCK) -> list[Ask]:
    every = max(1, checkpoint // MOONCAKE_BLOCK)
    asks = []
    for row in rows:
        segments = []
        for i, key in enumerate(row.hash_ids[: row.input_len // MOONCAKE_BLOCK]):
            segments.append(Segment(key, MOONCAKE_BLOCK, (i + 1) % every == 0))
        asks.append(Ask(row.input_len, row.output_len, tuple(segments)))
    return asks
