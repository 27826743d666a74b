"""Tool calls out of generated text, as it streams.

Understood are the formats models are trained on: Hermes and Qwen (``<tool_call>{"name": ..., "arguments": {...}}
</tool_call>``), Llama 3 (``<|python_tag|>`` or nothing, then ``{"name": ..., "parameters": {...}}``, several
divided by ``;``), Mistral (``[TOOL_CALLS] [{...}, ...]``) and the same JSON bare. Bare JSON counts only when it
begins the answer and names one of the tools; anything that turns out to be no call is given back as text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass

MARKERS = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]")
_CLOSE = "</tool_call>"
_CLOSING = re.compile(rf"(?:\s|{_CLOSE}|[;,\]])*")
_NAME = r'"name"\s*:\s*("(?:[^"\\]|\\.)*")'
_HEAD = re.compile(
    rf'\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?{_NAME}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)
_OTHER_KEY = re.compile(r'\{\s*(?:[^\s"]|"(?!(?:name|arguments|parameters|type|id|function)")[^"]*")')
_NAME_FIRST = re.compile(rf"\{{\s*{_NAME}")


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number `index` begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call number `index`: a piece of a JSON text."""

    index: int
    text: str


Event = Text | CallStart | CallArguments


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class JsonEnd:
    """Finds where one JSON object or array ends, character by character, without parsing it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """Characters of `text` up to and including the value's end; -1 when it goes on."""
        for i, c in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._in_string = False
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return -1


class NamedCallParser:
    """tool_choice names the tool, so all output is its arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = False

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        start: list[Event] = [] if self._started else [CallStart(0, call_id(), self._name)]
        self._started = True
        return [*start, CallArguments(0, text)]

    def finish(self) -> list[Event]:
        return [] if self._started else [CallStart(0, call_id(), self._name)]


class ToolCallParser:
    """Feed it text, get events. names: the tools there are. parallel: False keeps only the first call.

    forced: a grammar makes the output calls and nothing else, so what is left of one that was cut off is no text.
    """

    def __init__(self, names: Collection[str], parallel: bool = True, forced: bool = False) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._forced = forced
        self._buffer = ""
        self._raw = ""  # of the call being read: what to give back as text if it is none
        self._state = self._at_start
        self._marked = False  # inside a marker, where JSON is a call whatever it names
        self._calls = 0
        self._events: list[Event] = []
        self._arguments_end = JsonEnd()
        self._object_end = JsonEnd()
        self._scanned = 0  # how much of the buffer `_object_end` has seen while the call has no head yet

    @property
    def num_calls(self) -> int:
        return self._calls if self._parallel else min(self._calls, 1)

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """No more text comes: unfinished calls whose arguments have not begun were text."""
        if not self._forced and self._state in (
            self._at_start,
            self._in_text,
            self._after_marker,
            self._in_call,
        ):
            self._text(self._raw + self._buffer)
        self._buffer = self._raw = ""
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        if self._parallel:
            return events
        return [e for e in events if isinstance(e, Text) or e.index == 0]

    def _text(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    # States: each looks at the buffer and says whether the next state can go on at once.

    def _at_start(self) -> bool:
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        if stripped.startswith(MARKERS) or stripped[0] not in "{[":
            self._state = self._in_text
            return True
        if stripped[0] == "[":
            if any(marker.startswith(stripped) for marker in MARKERS):
                return False  # "[TOOL" may still become a marker
            if not stripped[1:].lstrip():
                return False
            if stripped[1:].lstrip()[0] != "{":
                self._state = self._in_text
                return True
        at = self._buffer.index("{")
        self._begin_call(at, marked=False)
        return True

    def _in_text(self) -> bool:
        found = [(self._buffer.find(m), m) for m in MARKERS if m in self._buffer]
        if found:
            at, marker = min(found)
            before = self._buffer[
                :at
            ].rstrip()  # the blank line that models put before a call belongs to the call
            self._text(before)
            self._raw = self._buffer[len(before) : at + len(marker)]
            self._buffer = self._buffer[at + len(marker) :]
            self._state = self._after_marker
            return True
        keep = _held_back(self._buffer)
        self._text(self._buffer[: len(self._buffer) - keep])
        self._buffer = self._buffer[len(self._buffer) - keep :]
        return False

    def _after_marker(self) -> bool:
        match = re.match(r"\s*\[?\s*", self._buffer)
        assert match is not None
        if match.end() == len(self._buffer):
            return False
        if self._buffer[match.end()] != "{":
            return self._no_call()
        self._begin_call(match.end(), marked=True)
        return True

    def _begin_call(self, at: int, marked: bool) -> None:
        self._raw += self._buffer[:at]
        self._buffer = self._buffer[at:]
        self._marked = marked
        self._object_end, self._scanned = JsonEnd(), 0
        self._state = self._in_call

    def _no_call(self) -> bool:
        self._text(self._raw)
        self._raw = ""
        self._state = self._in_text
        return True

    def _in_call(self) -> bool:
        """At an object that may be a call: wait for its name and the beginning of its arguments."""
        head = _HEAD.match(self._buffer)
        if head and self._buffer[head.end()] in "{[":
            name = _string(head.group(1))
            if name is None or not (self._marked or name in self._names):
                return self._no_call()
            self._start(name)
            self._arguments_end = JsonEnd()
            self._object_end.feed(self._buffer[self._scanned : head.end()])
            self._buffer = self._buffer[head.end() :]
            self._state = self._in_arguments
            return True
        if not self._marked and self._is_other_json():
            return self._no_call()
        end = self._object_end.feed(self._buffer[self._scanned :])
        if end < 0:
            self._scanned = len(self._buffer)
            return False
        return self._whole_call(self._scanned + end)

    def _is_other_json(self) -> bool:
        """The object's beginning already shows that it is no call, so its text need not wait."""
        name = _NAME_FIRST.match(self._buffer)
        return bool(_OTHER_KEY.match(self._buffer) or (name and _string(name.group(1)) not in self._names))

    def _whole_call(self, end: int) -> bool:
        """The object is complete and was not in the usual order: parse it."""
        call = _parsed_call(self._buffer[:end])
        if call is None or not (self._marked or call[0] in self._names):
            return self._no_call()
        self._start(call[0])
        self._events.append(CallArguments(self._calls - 1, call[1]))
        self._buffer = self._buffer[end:]
        self._state = self._after_call
        return True

    def _start(self, name: str) -> None:
        self._events.append(CallStart(self._calls, call_id(), name))
        self._calls += 1
        self._raw = ""

    def _in_arguments(self) -> bool:
        end = self._arguments_end.feed(self._buffer)
        piece = self._buffer if end < 0 else self._buffer[:end]
        if piece:
            self._events.append(CallArguments(self._calls - 1, piece))
            self._object_end.feed(piece)
        self._buffer = self._buffer[len(piece) :]
        if end < 0:
            return False
        self._state = self._in_rest
        return True

    def _in_rest(self) -> bool:
        """After the arguments: other keys of the call, which nobody asked for, up to its end."""
        end = self._object_end.feed(self._buffer)
        self._buffer = "" if end < 0 else self._buffer[end:]
        if end < 0:
            return False
        self._state = self._after_call
        return True

    def _after_call(self) -> bool:
        """Skip what closes or divides calls; then another call, or text."""
        match = _CLOSING.match(self._buffer)
        assert match is not None
        rest = self._buffer[match.end() :]
        if _CLOSE.startswith(rest):
            return False  # nothing yet, or the beginning of a closing tag
        if _CLOSE in match.group():
            self._marked = False
        self._buffer = rest
        if rest[0] == "{":
            self._begin_call(0, self._marked)
        else:
            self._state = self._in_text
        return True


def _held_back(buffer: str) -> int:
    """Length of the longest end of `buffer` that may begin a marker, with the blanks before it."""
    longest = min(len(buffer), max(map(len, MARKERS)) - 1)
    begun = next((n for n in range(longest, 0, -1) if any(m.startswith(buffer[-n:]) for m in MARKERS)), 0)
    return len(buffer) - len(buffer[: len(buffer) - begun].rstrip())


def _string(literal: str) -> str | None:
    try:
        value = json.loads(literal)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _parsed_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of a complete call object in any order and nesting models use."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value.get("function"), dict):  # OpenAI's own nesting
        value = value["function"]
    name = value.get("name") if isinstance(value.get("name"), str) else value.get("function")
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):  # JSON in a string, as OpenAI writes it
        return name, arguments
    return name, json.dumps(arguments)
