"""The seams of the core: what a step is, who executes it, who tells the time, what it costs.

`serve` plugs in a torch executor and the real clock, `plan` and `bench --simulate` a cost model and a virtual
clock, tests and replays recorded results. The core never sees tensors, devices or files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from llmtool.core.request import Request, SamplingParams, TokenLogprob
from llmtool.core.stats import SpecCounters


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy one page of a KV group; src and dst are table entries (offsets in UNIT bytes) in the memories the list
    implies."""

    src: int
    dst: int
    group: int = 0


@dataclass(slots=True)
class Received:
    """A sequence that was computed elsewhere: where its KV is to be written. entries: per group, in the order in
    which the sender read them. kv: the bytes, which the engine puts in; the scheduler knows nothing of them."""

    id: str
    entries: Sequence[Sequence[int]]
    kv: bytes = b""


@dataclass(slots=True)
class NewRequest:
    """A sequence the executor has not seen, or has dropped: everything it must know about it.

    token_ids: every token known so far, prompt and output. tables: one per KV group, the whole block table.
    """

    id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    tables: Sequence[Sequence[int]]


@dataclass(slots=True)
class ScheduledRequest:
    """Work of one step for one sequence: compute KV of positions [start, start + num_tokens).

    new_token_ids: tokens appended since the executor last heard of this sequence (usually the one it sampled).
    new_pages: per KV group, table entries to append; table_edits: (group, index, entry) to overwrite, as
    copy-on-write does. sample: the last position's logits are to be sampled. draft: guesses at the tokens that
    follow the last known one; they are the last of num_tokens, and the token after each of them is sampled too.
    parents: of a tree of drafts, the index of the one that each follows, which is before it; -1: the last known
    token. () where each follows the one before it. Their KV is laid down in this order, and that of the drafts that
    were right is moved to its place by the executor.
    keep_pages: per group, how many entries of the table are left before new_pages are appended; () keeps all.
    """

    id: str
    start: int
    num_tokens: int
    sample: bool
    new_token_ids: Sequence[int] = ()
    new_pages: Sequence[Sequence[int]] = ()
    table_edits: Sequence[tuple[int, int, int]] = ()
    draft: Sequence[int] = ()
    keep_pages: Sequence[int] = ()
    parents: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafts of which several may follow the same token: tokens and parents as in ScheduledRequest."""

    tokens: Sequence[int]
    parents: Sequence[int]


@dataclass(slots=True)
class SchedulerOutput:
    """One step's decisions. An executor applies them in the order of the fields."""

    step_id: int
    finished: list[str] = field(default_factory=list)  # forget these sequences
    swap_out: list[PageCopy] = field(default_factory=list)  # device -> host
    swap_in: list[PageCopy] = field(default_factory=list)  # host -> device
    copies: list[PageCopy] = field(default_factory=list)  # device -> device, copy-on-write
    new: list[NewRequest] = field(default_factory=list)
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)  # lost their pages; they come back as new
    num_tokens: int = 0  # sum over scheduled
    received: list[Received] = field(default_factory=list)  # written after swaps and copies

    @property
    def empty(self) -> bool:
        """True when nothing was decided: nothing to run, no page to move, no sequence to forget."""
        return not (self.scheduled or self.finished or self.preempted or self.swap_in or self.copies)


@dataclass(slots=True)
class StepResult:
    """What a step produced.

    tokens: parallel to SchedulerOutput.scheduled, the sampled tokens ([] where sample was False): one, and one more
    for each draft token that equals the token sampled in its place and follows only such; of a tree, along the path
    of such drafts.
    logprobs: for sequences that asked, one per sampled token. prompt_logprobs: for sequences that asked, of the
    positions this step computed: logprobs of tokens [start + 1, start + num_tokens], last one only if known.
    errors: sequences that failed, with a sentence; they are finished with FinishReason.ERROR.
    """

    step_id: int
    tokens: list[list[int]]
    logprobs: Mapping[str, Sequence[TokenLogprob]] = field(default_factory=dict)
    prompt_logprobs: Mapping[str, Sequence[TokenLogprob]] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class Executor(Protocol):
    """Runs steps in submission order; up to `max_in_flight` submitted and not yet collected."""

    max_in_flight: int

    def submit(self, out: SchedulerOutput) -> None: ...

    def collect(self) -> StepResult:
        """The oldest submitted step's result; blocks until it is there."""
        ...


@runtime_checkable
class MovesPages(Protocol):
    """An executor that heeds SchedulerOutput.received, and whose pages can be read between two steps."""

    def read_pages(self, entries: Sequence[Sequence[int]]) -> bytes:
        """The bytes of these pages, group by group. No step in flight may be writing them."""
        ...


class Drafts(Protocol):
    """Where a scheduler's drafts come from: speculation guesses them, a replay has recorded them."""

    def plan(
        self, out: SchedulerOutput, decoding: Sequence[int], work: Sequence[Request], room: int
    ) -> Sequence[Sequence[int] | DraftTree]:
        """Draft tokens for entries `decoding` of out.scheduled, which compute one token each and sample the next;
        at most `room` in all. work: the sequences of out.scheduled."""
        ...

    def record(self, out: SchedulerOutput, result: StepResult) -> None:
        """A step has been run, but not committed; in the order of steps."""
        ...

    def forget(self, ended: Sequence[str]) -> None:
        """These sequences are over."""
        ...

    def count(self, counters: SpecCounters) -> None:
        """Bring the counters up to date."""
        ...


class Clock(Protocol):
    def now(self) -> float:
        """Seconds, monotonic, from an arbitrary origin."""
        ...

    def elapse(self, seconds: float) -> None:
        """A step took this long. The real clock has seen it already; a virtual one moves."""
        ...

    def wait_until(self, moment: float) -> None:
        """Nothing to do before `moment`."""
        ...


class RealClock:
    def now(self) -> float:
        return time.monotonic()

    def elapse(self, seconds: float) -> None:
        pass

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - time.monotonic()))


class VirtualClock:
    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def elapse(self, seconds: float) -> None:
        assert seconds >= 0
        self._now += seconds

    def wait_until(self, moment: float) -> None:
        self._now = max(self._now, moment)


class StepCost(Protocol):
    """How long a step takes, without running it."""

    def seconds(self, num_tokens: int, kv_tokens: int, num_requests: int) -> float:
        """num_tokens: batched tokens; kv_tokens: context tokens read by attention, summed over requests."""
        ...
