"""Drafts from text: against a brute-force search, bounded, and never across salts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.core.speculation.draft import NOTHING, Draft, leading_matches
from llmtool.core.speculation.proposers import ReplayProposer, UnionProposer
from llmtool.core.speculation.suffix import BOUNDARY, CANDIDATES, MAX_MATCH, SuffixProposer
from llmtool.errors import UsageError

TOKENS = st.lists(st.integers(0, 4), min_size=0, max_size=70)


def longest(tokens: list[int], places: range) -> int:
    """Length of the longest match of the end of `tokens` with text that ends before one of `places`; 0: none."""
    best = 0
    for place in places:
        length = 0
        while length < min(place, MAX_MATCH) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        best = max(best, length)
    return best if best >= 2 else 0


@given(TOKENS, st.integers(0, 30), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_a_match_is_there_and_no_longer_one_is_nearby(tokens: list[int], known: int, limit: int) -> None:
    proposer = SuffixProposer(0)
    proposer.begin("a", tokens[:known])
    for token in tokens[known:]:
        proposer.observe("a", [token])
    draft = proposer.propose("a", limit)
    n = len(tokens)
    everywhere = longest(tokens, range(2, n))
    assert draft.match <= everywhere
    ends = [i for i in range(2, n) if tokens[i - 2 : i] == tokens[-2:]]
    nearby = max((longest(tokens, range(i, i + 1)) for i in ends[-CANDIDATES:]), default=0)
    assert draft.match >= nearby
    assert bool(draft.tokens) == (everywhere > 0)
    if not draft.tokens:
        return
    assert len(draft.tokens) == limit
    # Some earlier place with such a match goes on with it, repeating itself past the end.
    places = [i for i in range(2, n) if longest(tokens, range(i, i + 1)) >= draft.match]
    continued = [[tokens[i + j % (n - i)] for j in range(limit)] for i in places]
    assert list(draft.tokens) in continued


@given(TOKENS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_tokens_may_come_in_any_portions(tokens: list[int], rng: random.Random) -> None:
    one, many = SuffixProposer(), SuffixProposer()
    for proposer in (one, many):
        proposer.begin("a", [])
    for token in tokens:
        one.observe("a", [token])
    rest = list(tokens)
    while rest:
        size = rng.randint(1, 5)
        many.observe("a", rest[:size])
        rest = rest[size:]
    a, b = one.propose("a", 8), many.propose("a", 8)
    assert bool(a.tokens) == bool(b.tokens)
    one.finish("a"), many.finish("a")
    assert one.held_tokens == many.held_tokens


def test_finished_sequences_help_those_with_the_same_salt_only() -> None:
    proposer = SuffixProposer()
    proposer.begin("a", [5, 6, 7], "tenant")
    proposer.observe("a", [8, 9, 10])
    proposer.finish("a")
    proposer.begin("b", [1, 6, 7], "tenant")
    proposer.begin("c", [1, 6, 7], "other")
    proposer.begin("d", [1, 6, 7])
    assert proposer.propose("b", 5) == Draft([8, 9, 10], "suffix", 2)
    assert proposer.propose("c", 5) == proposer.propose("d", 5) == NOTHING


def test_a_draft_ends_where_its_source_ends() -> None:
    proposer = SuffixProposer()
    for name in ("a", "b"):
        proposer.begin(name, [1, 2, 3] if name == "a" else [4, 5, 6])
        proposer.finish(name)
    proposer.begin("c", [1, 2])
    draft = proposer.propose("c", 8)
    assert draft.tokens == [3] and BOUNDARY not in draft.tokens
    proposer.observe("c", [3])
    assert proposer.propose("c", 8) == NOTHING, "nothing follows it"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 90)), max_size=60), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_the_corpus_stays_within_its_bound(lengths: list[tuple[int, int]], bound: int) -> None:
    proposer = SuffixProposer(bound)
    for i, (salt, length) in enumerate(lengths):
        proposer.begin(str(i), list(range(length)), str(salt))
        proposer.finish(str(i))
        assert proposer.held_tokens <= bound
        held = sum(len(c.young.tokens) + len(c.old.tokens) for c in proposer._corpora.values())
        assert held == proposer.held_tokens
    assert not proposer._live


def test_unknown_ones_are_ignored_and_bad_bounds_refused() -> None:
    SuffixProposer().finish("never seen")
    with pytest.raises(UsageError, match="-1 tokens"):
        SuffixProposer(-1)
    with pytest.raises(UsageError, match="at least one"):
        UnionProposer([])


def test_replay_says_what_was_recorded() -> None:
    draft = Draft([7, 8, 9], "suffix", 5)
    proposer = ReplayProposer({"a": {4: draft}})
    proposer.begin("a", [1, 2, 3])
    assert proposer.propose("a", 2) == NOTHING
    proposer.observe("a", [4])
    assert proposer.propose("a", 2) == Draft([7, 8], "suffix", 5)
    assert proposer.propose("a", 0) == NOTHING
    proposer.begin("b", [1, 2, 3, 4])
    assert proposer.propose("b", 2) == NOTHING


def test_a_union_takes_the_longest_match() -> None:
    recorded = ReplayProposer({"a": {4: Draft([9], "replay", 3)}, "b": {4: Draft([9], "replay", 2)}})
    union = UnionProposer([SuffixProposer(), recorded])
    for name in ("a", "b", "c"):
        union.begin(name, [1, 2, 1, 2] if name != "c" else [1, 2, 3, 4])
    assert union.propose("a", 3) == Draft([9], "replay", 3)
    assert union.propose("b", 3) == Draft([1, 2, 1], "suffix", 2), "the first among equals"
    assert union.propose("c", 3) == NOTHING
    union.observe("c", [3, 4])
    assert union.propose("c", 2) == Draft([3, 4], "suffix", 2)
    union.finish("c")


def test_leading_matches() -> None:
    assert leading_matches([1, 2, 3], [1, 2]) == 2
    assert leading_matches([1, 2, 3], [1, 5, 3]) == 1
    assert leading_matches([], [1]) == 0
