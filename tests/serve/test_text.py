"""Stop strings against a brute-force oracle; text of tokens cut anyhow."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.models.detokenizer import Detokenizer
from llmtool.models.tokenizer import LONG_TEXT
from llmtool.serve.text import AnswerText, StopStrings
from tests.serve.fake import tiny_tokenizer

ALPHABET = "abc"
stops_of = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first prefix of `text` that ends with a stop string, the longest one."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stops if text[:end].endswith(s)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=4), max_size=12), stops_of)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    search, out = StopStrings(stops), ""
    for piece in pieces:
        out += search.push(piece)
        if search.found is not None:
            break
    else:
        out += search.release()
    assert (out, search.found) == oracle("".join(pieces), stops)


@settings(deadline=None)
@given(st.text(ALPHABET, max_size=12), stops_of)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    search = StopStrings(stops)
    out = search.push(text)
    if search.found is None:
        held = text[len(out) :]
        assert out + held == text
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.integers(1, 5), min_size=1, max_size=30))
def test_answer_text_joins_to_the_whole(text: str, cuts: list[int]) -> None:
    tokens = tiny_tokenizer().encode(text)
    answer, out, at = AnswerText(Detokenizer(tiny_tokenizer())), "", 0
    for size in [*cuts, len(tokens) + 1]:
        out += answer.push(tokens[at : at + size], last=at + size >= len(tokens)).text
        at += size
        if at >= len(tokens):
            break
    assert out == tiny_tokenizer().decode(tokens)


def test_stop_strings_wait_for_min_tokens() -> None:
    tokens = tiny_tokenizer().encode("xaxaxa")
    early = AnswerText(Detokenizer(tiny_tokenizer()), ["a"])
    assert early.push(tokens).text == "x"
    late = AnswerText(Detokenizer(tiny_tokenizer()), ["a"], min_tokens=3)
    piece = late.push(tokens)
    assert (piece.text, piece.num_tokens, piece.stop) == ("xax", 4, "a")


def test_long_text_has_the_tokens_that_the_plain_encoder_gives_it() -> None:
    tokenizer = tiny_tokenizer()
    text = "The quick brown fox 🙂 <|im_end|> jumps.\n" * 500
    assert len(text) > LONG_TEXT
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
    assert (
        max(len(tokenizer.decode([i], skip_special_tokens=False)) for i in range(320))
        <= tokenizer.longest_token
    )
