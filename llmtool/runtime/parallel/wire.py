"""A step's decision as integers, as rank 0 broadcasts it, and back.

Sequences have numbers on the wire. Table entries are those of the page plan; each rank makes them its own
(llmtool/parallel/pages.py). Besides the decision it says which rows' logits will be asked for, in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmtool.core.ports import NewRequest, PageCopy, ScheduledRequest, SchedulerOutput
from llmtool.core.request import SamplingParams
from llmtool.parallel.pages import LocalPages

Words = NDArray[np.int32]
Ints = NDArray[np.int64]
HEAD = 2048  # words of a message that are sent at once; a longer one is followed by the rest
STEP, STOP = 1, 2  # what a message is
_PARAMS = SamplingParams()  # other ranks do not sample


class Numbers:
    """Sequences' names as numbers."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._next = 0

    def new(self, seq: str) -> int:
        if seq not in self._of:
            self._of[seq] = self._next
            self._next += 1
        return self._of[seq]

    def __getitem__(self, seq: str) -> int:
        return self._of[seq]

    def forget(self, seqs: Sequence[str]) -> list[int]:
        """The numbers of those that have one, which nobody will hear of again."""
        return [number for seq in seqs if (number := self._of.pop(seq, None)) is not None]


def encode(out: SchedulerOutput, wanted: Sequence[Ints], numbers: Numbers) -> Words:
    """int32: the message's length, its kind, and the decision."""
    gone = numbers.forget([*out.finished, *out.preempted])
    words: list[int] = [0, STEP, out.step_id & 0x7FFFFFFF, len(gone), *gone]
    for copies in (out.swap_out, out.swap_in, out.copies):
        words.append(len(copies))
        for copy in copies:
            words += (copy.src, copy.dst, copy.group)
    words.append(len(out.new))
    for new in out.new:
        words += (numbers.new(new.id), new.num_prompt_tokens, len(new.token_ids), *new.token_ids)
        _put_lists(words, new.tables)
    words.append(len(out.scheduled))
    for entry in out.scheduled:
        words += (numbers[entry.id], entry.start, entry.num_tokens, int(entry.sample))
        _put_list(words, entry.new_token_ids)
        _put_lists(words, entry.new_pages)
        words.append(len(entry.table_edits))
        for edit in entry.table_edits:
            words += edit
        _put_list(words, entry.draft)
        _put_list(words, entry.keep_pages)
    words.append(len(wanted))
    for rows in wanted:
        _put_list(words, rows.tolist())
    words[0] = len(words)
    return np.array(words, np.int32)


def decode(words: Words) -> tuple[SchedulerOutput, list[Ints]]:
    """A step's message: the decision, sequences called by their numbers, and the rows that are wanted."""
    at = iter(words.tolist())
    next(at)
    assert next(at) == STEP
    out = SchedulerOutput(next(at))
    out.finished = [str(number) for number in _list(at)]
    for copies in (out.swap_out, out.swap_in, out.copies):
        copies += [PageCopy(next(at), next(at), next(at)) for _ in range(next(at))]
    for _ in range(next(at)):
        name, prompt, tokens = str(next(at)), next(at), _list(at)
        out.new.append(NewRequest(name, tokens, prompt, _PARAMS, 0, _lists(at)))
    for _ in range(next(at)):
        entry = ScheduledRequest(str(next(at)), next(at), next(at), bool(next(at)))
        entry.new_token_ids, entry.new_pages = _list(at), _lists(at)
        entry.table_edits = [(next(at), next(at), next(at)) for _ in range(next(at))]
        entry.draft, entry.keep_pages = _list(at), _list(at)
        out.scheduled.append(entry)
        out.num_tokens += entry.num_tokens
    wanted = [np.array(_list(at), np.int64) for _ in range(next(at))]
    return out, wanted


def stop() -> Words:
    """The message after which there is none."""
    return np.array([2, STOP], np.int32)


def localise(out: SchedulerOutput, pages: LocalPages) -> SchedulerOutput:
    """The decision about this rank's pages: groups that it has nothing of are left out."""
    place = {group: i for i, group in enumerate(pages.kept)}

    def copies(given: Sequence[PageCopy]) -> list[PageCopy]:
        mine = [(place[copy.group], copy) for copy in given if copy.group in place]
        return [PageCopy(entry(g, copy.src), entry(g, copy.dst), g) for g, copy in mine]

    def entry(group: int, given: int) -> int:
        return int(pages.entries(group, given))

    def tables(given: Sequence[Sequence[int]]) -> list[list[int]]:
        return (
            [pages.entries(i, given[group]).tolist() for i, group in enumerate(pages.kept)] if given else []
        )

    def local(work: ScheduledRequest) -> ScheduledRequest:
        if not (work.new_pages or work.table_edits or work.keep_pages):
            return work
        return replace(
            work,
            new_pages=tables(work.new_pages),
            table_edits=[
                (place[g], i, entry(place[g], page)) for g, i, page in work.table_edits if g in place
            ],
            keep_pages=[work.keep_pages[group] for group in pages.kept] if work.keep_pages else (),
        )

    return replace(
        out,
        swap_out=copies(out.swap_out),
        swap_in=copies(out.swap_in),
        copies=copies(out.copies),
        new=[replace(new, tables=tables(new.tables)) for new in out.new],
        scheduled=[local(work) for work in out.scheduled],
    )


def _put_list(words: list[int], values: Sequence[int]) -> None:
    words.append(len(values))
    words += values


def _put_lists(words: list[int], lists: Sequence[Sequence[int]]) -> None:
    words.append(len(lists))
    for values in lists:
        _put_list(words, values)


def _list(at: Iterator[int]) -> list[int]:
    return [next(at) for _ in range(next(at))]


def _lists(at: Iterator[int]) -> list[list[int]]:
    return [_list(at) for _ in range(next(at))]
