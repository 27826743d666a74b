from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.serve.tools.parser import CallArguments, CallStart, Event, Text, ToolCallParser

NAMES = {"get_weather", "add"}
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris }\\" {"}}\n</tool_call>'
PARIS = ("get_weather", {"city": 'Paris }" {'})
ADD = ("add", {"a": [1, 2], "b": {"c": "]"}})
Calls = list[tuple[str, Any]]

CASES: list[tuple[str, str, Calls]] = [
    ("plain text, even with < and [ in it", "plain text, even with < and [ in it", []),
    (HERMES, "", [PARIS]),
    (f"Let me look.\n\n{HERMES}", "Let me look.", [PARIS]),
    (f'{HERMES}\n<tool_call>{{"name": "add", "arguments": {json.dumps(ADD[1])}}}</tool_call>', "", [PARIS, ADD]),
    (f"{HERMES} and that is all", "and that is all", [PARIS]),
    ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    ('{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}', "",
     [("add", {"a": 1}), ("add", {"a": 2})]),
    ('{"type": "function", "name": "add", "parameters": {}}', "", [("add", {})]),
    ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {}}]', "",
     [("add", {"a": 1}), ("add", {})]),
    ('[{"name": "add", "arguments": {"a": 1}}]', "", [("add", {"a": 1})]),
    ('{"arguments": {"a": 1}, "name": "add"}', "", [("add", {"a": 1})]),
    ('{"function": {"name": "add", "arguments": "{\\"a\\": 1}"}}', "", [("add", {"a": 1})]),
    ('{"name": "add", "arguments": {"a": 1}, "id": {"x": "}"}}', "", [("add", {"a": 1})]),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [("unknown", {})]),
    # JSON that is an answer, not a call.
    ('{"name": "Alice", "age": 3}', '{"name": "Alice", "age": 3}', []),
    ('{"city": "Paris"} <b>', '{"city": "Paris"} <b>', []),
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ("[1, 2, 3]", "[1, 2, 3]", []),
    ("[]", "[]", []),
    ("{", "{", []),
    # Broken off or broken.
    ("<tool_call> no JSON here", "<tool_call> no JSON here", []),
    ('Hm.\n<tool_call>\n{"name": "ad', 'Hm.\n<tool_call>\n{"name": "ad', []),
    ("trailing <tool_ca", "trailing <tool_ca", []),
]  # fmt: skip


def gather(events: list[Event]) -> tuple[str, Calls]:
    text, names, arguments = "", [], []
    for event in events:
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(names) and event.id.startswith("call_")
            names.append(event.name)
            arguments.append("")
        elif isinstance(event, CallArguments):
            arguments[event.index] += event.text
    return text, [(n, json.loads(a)) for n, a in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_formats(text: str, content: str, calls: Calls) -> None:
    parser = ToolCallParser(NAMES)
    assert gather([*parser.feed(text), *parser.finish()]) == (content, calls)


@settings(deadline=None)
@given(st.sampled_from(CASES), st.lists(st.integers(1, 9), min_size=1, max_size=80))
def test_streaming_finds_the_same(case: tuple[str, str, Calls], sizes: list[int]) -> None:
    text, content, calls = case
    parser, events, at = ToolCallParser(NAMES), list[Event](), 0
    for size in [*sizes, len(text)]:
        events += parser.feed(text[at : at + size])
        at += size
    assert gather([*events, *parser.finish()]) == (content, calls)


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = ToolCallParser(NAMES)
    events = [e for c in HERMES[: HERMES.index("Paris") + 3] for e in parser.feed(c)]
    assert isinstance(events[0], CallStart) and events[0].name == "get_weather"
    assert "".join(e.text for e in events[1:] if isinstance(e, CallArguments)) == '{"city": "Par'


def test_plain_text_is_not_delayed() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.feed("Hello") == [Text("Hello")]
    assert parser.feed(' {"x": 1}') == [Text(' {"x": 1}')]
    other = ToolCallParser(NAMES)
    assert other.feed('{"answer":') == [Text('{"answer":')]  # no key of a call: no waiting for the end


def test_without_parallel_only_the_first_call_is_kept() -> None:
    parser = ToolCallParser(NAMES, parallel=False)
    _, calls = gather([*parser.feed(HERMES + HERMES), *parser.finish()])
    assert calls == [PARIS]


@settings(deadline=None)
@given(st.text('{}[]"\\,:<>/ tool_cal|namerguets', max_size=60))
def test_anything_goes_through_without_harm(text: str) -> None:
    whole, pieces = ToolCallParser(NAMES), ToolCallParser(NAMES)
    one = [*whole.feed(text), *whole.finish()]
    many = [e for c in text for e in pieces.feed(c)] + pieces.finish()
    assert [_plain(e) for e in _joined(one)] == [_plain(e) for e in _joined(many)]


def _joined(events: list[Event]) -> list[Event]:
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        elif (
            isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index
        ):
            out[-1] = CallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out


def _plain(event: Event) -> object:
    return (event.index, event.name) if isinstance(event, CallStart) else event
