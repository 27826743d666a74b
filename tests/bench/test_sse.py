from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtool.bench.sse import SSEDecoder, StreamError, StreamParser, carries_output, error_message


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(value: str, **choice: Any) -> bytes:
    return event(choices=[{"index": 0, "text": value, "finish_reason": None} | choice])


def delta(**fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": None}])


def followed(chunks: list[bytes], keep_text: bool = True) -> StreamParser:
    """The i-th chunk arrives at second i."""
    parser = StreamParser(keep_text)
    for i, chunk in enumerate(chunks):
        parser.feed(chunk, float(i))
    parser.close(float(len(chunks)))
    return parser


def test_a_completion_stream() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    parser = followed(
        [
            text("Hel"),
            text("lo"),
            text("", finish_reason="length"),
            event(choices=[], usage=usage),
            b"data: [DONE]\n\n",
        ]
    )
    assert (parser.first, parser.last, parser.end) == (0.0, 1.0, 2.0)
    assert parser.itls == [1.0]
    assert parser.text == "Hello"
    assert (parser.finish_reason, parser.usage, parser.done) == ("length", usage, True)


def test_a_chat_stream_starts_with_its_first_content() -> None:
    parser = followed([delta(role="assistant", content=""), delta(content="Hi"), delta(content="!")])
    assert (parser.first, parser.last, parser.chunks) == (1.0, 2.0, 2)
    assert parser.text == "Hi!"


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "x"},
        {"reasoning": "x"},
        {"reasoning_content": "x"},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]},
        {"refusal": "x"},
    ],
)
def test_all_that_a_model_generates_is_output(fields: dict[str, Any]) -> None:
    parser = followed([delta(role="assistant", content=""), delta(**fields)])
    assert parser.first == 1.0
    assert parser.text in ("x", "f{}")


def test_finish_reason_in_the_last_text_chunk() -> None:
    parser = followed([text("a"), text("b", finish_reason="stop")])
    assert (parser.itls, parser.end, parser.finish_reason) == ([1.0], 1.0, "stop")


def test_a_stream_without_text_ends_with_its_finish_reason() -> None:
    parser = followed([text("", finish_reason="stop"), b"data: [DONE]\n\n"])
    assert (parser.first, parser.end, parser.chunks) == (None, 0.0, 0)


def test_errors_inside_the_stream() -> None:
    parser = followed([text("a"), event(error={"message": "out of pages", "code": 500}), b"data: [DONE]\n\n"])
    assert parser.error == "out of pages"
    assert followed([event(object="error", message="old style")]).error == "old style"


@pytest.mark.parametrize(
    "bad", [b"data: {oops\n\n", b"data: 3\n\n", b"data: \xff\xfe\n\n", b'data: {"text":"\\q"}\n\n']
)
def test_garbage_is_a_stream_error(bad: bytes) -> None:
    with pytest.raises(StreamError, match="an event that is not"):
        followed([bad])


def test_comments_other_fields_and_crlf_are_skipped() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b": ping\r\nevent: x\r\nid: 3\r\ndata: {}\r\n\r\ndata:[DONE]\n") == [b"{}", b"[DONE]"]
    assert decoder.feed(b"data: tail") == []
    assert decoder.close() == [b"tail"]
    assert decoder.close() == []


# Text meant to fool a byte scanner: keys, quotes, escapes, nulls, all as content.
FOOLS = [
    '"text":"x"',
    '"content": "',
    '\\"',
    "\\",
    '{"error":{"message":"no"}}',
    '"usage":{',
    '"finish_reason":"stop"',
]
tricky = st.one_of(st.sampled_from([*FOOLS, "n", "\n"]), st.text(max_size=8))


@given(st.lists(tricky, max_size=6), st.booleans(), st.booleans(), st.data())
def test_bytes_cut_anywhere_give_what_json_gives(
    pieces: list[str], chat: bool, compact: bool, data: st.DataObject
) -> None:
    """The byte-level fast path against a plain JSON reader, on streams cut at random places."""
    separators = (",", ":") if compact else None
    stream = b""
    for piece in pieces:
        choice = {"index": 0} | ({"delta": {"content": piece}} if chat else {"text": piece})
        body = {"id": piece, "choices": [choice | {"finish_reason": None}], "usage": None}
        stream += b"data: " + json.dumps(body, separators=separators).encode() + b"\n\n"
    stream += b"data: [DONE]\n\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    parser = followed(parts)
    assert parser.text == "".join(pieces)
    assert parser.chunks == sum(bool(p) for p in pieces)
    assert len(parser.itls) == max(0, parser.chunks - 1)
    assert parser.done
    assert not parser.error
    assert parser.finish_reason is None
    assert parser.usage == {}
    assert followed(parts, keep_text=False).itls == parser.itls


def test_carries_output_takes_token_ids_and_ignores_nulls() -> None:
    assert carries_output({"text": "", "token_ids": [5]})
    assert not carries_output({"delta": {"role": "assistant", "content": None}})
    assert not carries_output({})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "too long"}}, "too long"),
        ({"error": "plain"}, "plain"),
        ({"detail": "fastapi"}, "fastapi"),
        ({"message": "bare"}, "bare"),
        ("text", "text"),
    ],
)
def test_error_bodies(body: Any, message: str) -> None:
    assert error_message(body) == message
