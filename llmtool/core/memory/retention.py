"""What cached pages are kept for, and in which order they go.

A prompt goes on where its prefix is whole in every layer type. Types that keep everything are whole anywhere up
to the deepest cached page; windows and states only where pages were kept for it: at a *restart point*. There are
three kinds. PROMPT: near a prompt's end or at a hint (an end of a chat message), where others part that ask
something else of the same text. ANSWER: the end of a sequence, where a conversation goes on. WAY: all places
between, which only a prompt needs that parts from another at a place of its own.

How much each kind is worth is learned: every prompt that finds a known prefix says, in tokens, what it wanted.
Kinds that are hardly wanted go before all others, and a point on the way counts an eighth of what it was wanted
for, since it alone saves only what lies between it and the one before. Points on the way are thinned by halves: one
at an odd multiple of their spacing goes first, then one at an odd multiple of twice that, so that what remains is
spread over the text. What an answer's end was is only on the way once a conversation has gone on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from llmtool.core.memory.geometry import LayerCacheSpec

# END: both PROMPT and ANSWER; TRUNK: pages of types that keep everything.
WAY, PROMPT, ANSWER, END, TRUNK = range(5)
ONCE = -1  # marks a block where one prompt has parted from another

FORGET = 15 / 16  # of what was wanted, at every further want
GUESS = 1024.0  # tokens that what a prompt looks like is worth, before any was wanted
ON_THE_WAY = 1 / 8
LAST = 1 << 40  # what pages that go before all others of their class are older by


class Wants:
    """Decayed tokens of prefixes that prompts found known, by the kind of point they parted at."""

    def __init__(self) -> None:
        self._wanted = [0.0, 0.0, 0.0]
        self.order = self._rank()

    def note(self, kind: int, tokens: int) -> None:
        wanted = self._wanted
        for k in (WAY, PROMPT, ANSWER):
            wanted[k] *= FORGET
        wanted[kind] += tokens
        self.order = self._rank()

    def expect(self, kind: int) -> None:
        """A prompt of which nothing is known looks as if this will be wanted."""
        if self._wanted[kind] < GUESS:
            self._wanted[kind] = GUESS
            self.order = self._rank()

    def _rank(self) -> tuple[int, ...]:
        """Per class, its turn: what is worth less than half of the best kind goes before what keeps everything,
        the least first; points on the way always do."""
        way, prompt, answer = self._wanted
        worth = (way * ON_THE_WAY, prompt, answer)
        best = max(worth)
        turns = [sum(w < own for w in worth) if own * 2 < best else TRUNK for own in worth]
        turns[WAY] = sum(other < worth[WAY] for other in worth)
        return (*turns, max(turns[PROMPT:]), TRUNK)


def level(position: int, spacing: int) -> int:
    """How often a point's number halves: 0 for odd multiples of `spacing`, -1 for no multiple of it."""
    if position % spacing:
        return -1
    number = position // spacing
    return (number & -number).bit_length() - 1


@lru_cache(maxsize=1 << 14)
def window_level(end: int, reach: int) -> int:
    """The highest level of a point that reads a page whose last token is before `end`, of a window of which `reach`
    tokens lie before a token: points lie the next power of two apart."""
    spacing = 1 << reach.bit_length()
    first, last = -(-end // spacing), (end + reach - 1) // spacing
    if first > last:
        return -1
    high = 0
    while (last >> (high + 1)) << (high + 1) >= max(first, 1):
        high += 1
    return high


def page_level(spec: LayerCacheSpec, end: int) -> int:
    """Of a page of a window or chunk that ends at token `end`."""
    if spec.kind == "sliding_window" and spec.window is not None:
        return window_level(end, max(1, spec.window - 1))
    return 0


def near_mark(marks: Sequence[int]) -> int:
    """The kind of point that a prompt parted at. marks: of the blocks before, nearest last."""
    return next((mark for mark in reversed(marks) if mark > 0), WAY)
