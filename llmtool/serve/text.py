"""From tokens to text as they come: incremental detokenization, and stop strings cut exactly.

Stop strings live here and not in the engine: they are about text, whose boundaries tokens do not keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmtool.models.detokenizer import Detokenizer


class StopStrings:
    """Looks for the string that is complete first (of several at once, the longest) in text that arrives in pieces.

    Text that may be the beginning of a stop string is held back, and no more than that: `push` gives
    everything that can no longer become part of one. How the text is cut into pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Text to hand out, up to and without the stop string; after that `found` is set."""
        if not self.stops:
            return text
        assert self.found is None
        buffer = self._held + text
        at, stop = self._first(buffer)
        if stop is not None:
            self.found, self._held = stop, ""
            return buffer[:at]
        keep = self._unfinished(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def release(self) -> str:
        """What is held back, when no more text comes: it was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first(self, buffer: str) -> tuple[int, str | None]:
        found = [(buffer.find(s) + len(s), -len(s), s) for s in self.stops if s in buffer]
        if not found:
            return -1, None
        end, _, stop = min(found)
        return end - len(stop), stop

    def _unfinished(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        for size in range(min(len(buffer), max(map(len, self.stops)) - 1), 0, -1):
            tail = buffer[-size:]
            if any(s.startswith(tail) for s in self.stops):
                return size
        return 0


@dataclass(slots=True)
class TextPiece:
    """text: new text to hand out. num_tokens: how many of the pushed tokens count; the ones after a stop string
    do not. stop: the stop string that ended the answer.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class AnswerText:
    """One answer's text.

    min_tokens: stop strings are not looked for before. include_stop: the stop string stays in the text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], *, last: bool = False, hide_last: bool = False) -> TextPiece:
        """Text of `token_ids`. last: nothing follows. hide_last: the last token is a stop token without text."""
        parts: list[str] = []
        for i in range(len(token_ids) - hide_last):  # one by one: a stop string must end at its own token
            parts.append(self._take(self._detokenizer.push(token_ids[i : i + 1])))
            if self._stops.found is not None:
                return TextPiece("".join(parts), i + 1, self._stops.found)
        self._num_tokens += hide_last
        if last:
            parts.append(self._take(self._detokenizer.finish(), counts=0))
            parts.append(self._stops.release())
        return TextPiece("".join(parts), len(token_ids), self._stops.found)

    def _take(self, text: str, counts: int = 1) -> str:
        self._num_tokens += counts
        if self._num_tokens <= self._min_tokens:
            return text  # too early to stop
        out = self._stops.push(text)
        if self._stops.found is not None and self._include_stop:
            out += self._stops.found
        return out
