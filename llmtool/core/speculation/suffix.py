"""Drafts from text seen before: how did the last few tokens go on, earlier in this sequence or in a finished one?

Prompt lookup with the longest match instead of a fixed n-gram. Every history is a list of tokens with a chain of
earlier places per 2-gram; candidates are extended backwards. A match that goes on being right is followed without
any search, as no other can be longer than the longest was plus one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from llmtool.core.speculation.draft import MAX_BRANCHES, NOTHING, Branch, Draft
from llmtool.errors import UsageError

MIN_MATCH = 2
MAX_MATCH = 32  # longer matches say nothing more
CANDIDATES = 8  # most recent places of a 2-gram that are looked at, per history
BOUNDARY = -1  # between the sequences of a corpus: equal to no token


class _History:
    """Tokens, and for each the previous place at which the 2-gram that ends there has ended."""

    __slots__ = ("earlier", "latest", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.earlier: list[int] = []  # by index; -1: none
        self.latest: dict[int, int] = {}  # 2-gram -> index of its last token, the most recent

    def extend(self, token_ids: Sequence[int]) -> None:
        tokens, earlier, latest = self.tokens, self.earlier, self.latest
        previous = tokens[-1] if tokens else BOUNDARY
        for token in token_ids:
            at = len(tokens)
            tokens.append(token)
            if previous < 0 or token < 0:
                earlier.append(-1)
            else:
                key = previous << 32 | token
                earlier.append(latest.get(key, -1))
                latest[key] = at
            previous = token

    def longest(self, tail: list[int], at: int, best: int) -> tuple[int, int]:
        """(match length, index after the match) of the longest match with the end of `tail` that is longer than
        `best`, the most recent among equals; (best, -1) if there is none. at: where to begin in the chain."""
        tokens, earlier, end = self.tokens, self.earlier, len(tail)
        found = -1
        for _ in range(CANDIDATES):
            if at < 0 or best >= MAX_MATCH:
                break
            longer = best + 1
            if longer <= at + 1 and tokens[at + 1 - longer : at + 1] == tail[end - longer :]:
                most = min(at + 1, end, MAX_MATCH)
                while longer < most and tokens[at - longer] == tail[end - 1 - longer]:
                    longer += 1
                best, found = longer, at + 1
            at = earlier[at]
        return best, found

    def matches(self, tail: list[int], at: int) -> list[tuple[int, int]]:
        """(match length, index after the match) of the most recent places that match the end of `tail`."""
        tokens, earlier, end = self.tokens, self.earlier, len(tail)
        found: list[tuple[int, int]] = []
        while at >= 0 and len(found) < CANDIDATES:
            length, most = MIN_MATCH, min(at + 1, end, MAX_MATCH)
            while length < most and tokens[at - length] == tail[end - 1 - length]:
                length += 1
            found.append((length, at + 1))
            at = earlier[at]
        return found


class _Corpus:
    """Finished sequences of one salt in two generations: a full one replaces the one before it."""

    def __init__(self) -> None:
        self.young, self.old = _History(), _History()

    def __len__(self) -> int:
        return len(self.young.tokens) + len(self.old.tokens)

    def add(self, token_ids: Sequence[int], generation: int) -> None:
        if self.young.tokens and len(self.young.tokens) + len(token_ids) >= generation:
            self.old, self.young = self.young, _History()
        self.young.extend([BOUNDARY])
        self.young.extend(token_ids[-(generation - 1) :])


class _Live:
    __slots__ = ("end", "history", "length", "salt", "source")

    def __init__(self, salt: str) -> None:
        self.history = _History()
        self.salt = salt
        self.source: _History | None = None  # where the match lies
        self.end = self.length = 0  # index after it, and how long it is


class SuffixProposer:
    """corpus_tokens: finished sequences kept, over all salts, in tokens (some 150 bytes each); 0: each sequence
    sees itself only. When it is full, the salt that was longest without a new sequence loses its oldest half.
    branches: ways on that one draft shows at most, 1 being a chain; the others are those of further matches.

    Raises UsageError if corpus_tokens is negative, or branches out of range.
    """

    name = "suffix"

    def __init__(self, corpus_tokens: int = 1 << 18, branches: int = 1) -> None:
        check_branches(branches)
        if corpus_tokens < 0:
            raise UsageError(
                f"A corpus cannot hold {corpus_tokens} tokens.", "Give 0 to keep none, or a positive number."
            )
        self.corpus_tokens, self.branches = corpus_tokens, branches
        self._live: dict[str, _Live] = {}
        self._corpora: OrderedDict[str, _Corpus] = OrderedDict()  # by salt, least recently added to first
        self._held = 0

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        live = self._live[seq] = _Live(salt)
        live.history.extend(token_ids)
        self._search(live)

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        live = self._live[seq]
        history = live.history
        for position, token in enumerate(token_ids):
            source = live.source
            if source is not None and live.end < len(source.tokens) and source.tokens[live.end] == token:
                live.end += 1
                live.length += 1
            else:
                history.extend(token_ids[position:])
                self._search(live)
                return
            history.extend((token,))

    def propose(self, seq: str, limit: int) -> Draft:
        live = self._live[seq]
        if live.source is None or limit <= 0:
            return NOTHING
        known = live.source.tokens
        tokens = known[live.end : live.end + limit]
        if live.source is live.history:
            period = tokens  # a match that reaches the end goes on with itself
            while len(tokens) < limit:
                tokens = (tokens + period)[:limit]
        elif BOUNDARY in tokens:
            tokens = tokens[: tokens.index(BOUNDARY)]
        if not tokens:
            return NOTHING
        others = self._branches(live, tokens, limit) if self.branches > 1 else ()
        return Draft(tokens, self.name, min(live.length, MAX_MATCH), others)

    def _branches(self, live: _Live, tokens: list[int], limit: int) -> list[Branch]:
        """Where other matches go on otherwise than `tokens`, longer ones first, and own ones among equals."""
        own, tail = live.history, live.history.tokens
        key = tail[-2] << 32 | tail[-1]
        found = [(length, own, end) for length, end in own.matches(tail, own.earlier[-1])]
        corpus = self._corpora.get(live.salt)
        for other in (corpus.young, corpus.old) if corpus is not None else ():
            found += [(length, other, end) for length, end in other.matches(tail, other.latest.get(key, -1))]
        found.sort(key=lambda match: -match[0])
        branches: list[Branch] = []
        for length, history, end in found:
            way = history.tokens[end : end + limit]
            if BOUNDARY in way:
                way = way[: way.index(BOUNDARY)]
            branch = _diverging(tokens, branches, way, length)
            if branch is not None:
                branches.append(branch)
                if len(branches) == self.branches - 1:
                    break
        return branches

    def finish(self, seq: str) -> None:
        live = self._live.pop(seq, None)
        generation = self.corpus_tokens // 2
        if live is None or generation < 2:
            return
        corpus = self._corpora.setdefault(live.salt, _Corpus())
        self._corpora.move_to_end(live.salt)
        self._held -= len(corpus)
        corpus.add(live.history.tokens, generation)
        self._held += len(corpus)
        while self._held > self.corpus_tokens:
            self._shrink()

    @property
    def held_tokens(self) -> int:
        """Tokens in the corpus, boundaries included."""
        return self._held

    def _shrink(self) -> None:
        salt, corpus = next(iter(self._corpora.items()))
        before = len(corpus)
        if corpus.old.tokens:
            corpus.old = _History()
        else:
            del self._corpora[salt]
            corpus.young = _History()
        self._held -= before - len(corpus)

    def _search(self, live: _Live) -> None:
        """The longest match of a sequence's end: its own first, then newer before older finished ones."""
        history = live.history
        tail = history.tokens
        live.source = None
        if len(tail) < MIN_MATCH:
            return
        best, end = history.longest(tail, history.earlier[-1], MIN_MATCH - 1)
        if end >= 0:
            live.source, live.length, live.end = history, best, end
        corpus = self._corpora.get(live.salt)
        if corpus is None:
            return
        key = tail[-2] << 32 | tail[-1]
        for other in (corpus.young, corpus.old):
            best, end = other.longest(tail, other.latest.get(key, -1), best)
            if end >= 0:
                live.source, live.length, live.end = other, best, end


def check_branches(branches: int) -> None:
    """Raises UsageError unless a draft may have so many."""
    if not 1 <= branches <= MAX_BRANCHES:
        raise UsageError(
            f"A draft cannot have {branches} branches.",
            f"Give 1 for a chain, or up to {MAX_BRANCHES} for a tree.",
        )


def _diverging(
    tokens: Sequence[int], branches: Sequence[Branch], way: Sequence[int], match: int
) -> Branch | None:
    """The branch by which the tree of `tokens` and `branches` also shows `way`; None if it does."""
    on, at, ahead = 0, 0, tokens
    for i, token in enumerate(way):
        if at < len(ahead) and ahead[at] == token:
            at += 1
            continue
        places = (
            (n, b) for n, b in enumerate(branches, 1) if (b.on, b.at) == (on, at) and b.tokens[0] == token
        )
        turn = next(places, None)
        if turn is None:
            return Branch(way[i:], match, on, at)
        on, at, ahead = turn[0], 1, turn[1].tokens
    return None
