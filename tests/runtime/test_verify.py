"""What verification emits is what the target draws: rows and acceptance by hand, and in distribution, with wrong
rules that the same tests must catch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from llmtool.core.request import SamplingParams
from llmtool.runtime.sampler import SamplingRows, sample
from llmtool.runtime.verify import SampledRows, depths_of, words_of

N, V = 10_000, 32
ALPHA = 1e-3


def test_rows_of_sequences_with_and_without_drafts() -> None:
    places = SampledRows.of([(7, 8), (), (9,)], np.array([4, 2, 5]))
    assert places.rows.tolist() == [4, 4, 4, 2, 5, 5]
    assert places.owners.tolist() == [0, 0, 0, 1, 2, 2]
    assert places.offsets.tolist() == [0, 1, 2, 0, 0, 1]
    assert list(places.ahead()) == [(), (7,), (7, 8), (), (), (9,)]
    assert places.spread(np.array([10, 20, 30])).tolist() == [10, 10, 10, 20, 30, 30]
    assert SampledRows.of([(), ()], np.array([1, 0])).ahead() == ()
    assert SampledRows.of([], np.zeros(0, np.int64)).rows.tolist() == []


@pytest.mark.parametrize(
    ("sampled", "broken", "tokens"),
    [
        ([1, 2, 3], {}, [1, 2, 3]),
        ([1, 5, 3], {}, [1, 5]),
        ([5, 2, 3], {}, [5]),
        ([1, 2, 3], {2}, [1, 2]),
        ([1, 2, 3], {1}, [1]),
        ([5, 2, 3], {1, 2}, [5]),
        ([1, 2, 3], {0}, []),
    ],
)
def test_drafts_are_accepted_while_they_are_what_was_sampled(
    sampled: list[int], broken: set[int], tokens: list[int]
) -> None:
    places = SampledRows.of([(1, 2)], np.array([0]))
    assert list(places.accepted(sampled, broken)) == [(range(max(1, len(tokens))), tokens)]


@given(st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=4), st.randoms(use_true_random=False))
def test_acceptance_is_walking_one_by_one(drafts: list[list[int]], rng: object) -> None:
    places = SampledRows.of(drafts, np.arange(len(drafts)))
    sampled = [rng.randint(0, 1) for _ in places.rows]  # type: ignore[attr-defined]
    begin = 0
    for draft, (path, tokens) in zip(drafts, places.accepted(sampled, ()), strict=True):
        own = sampled[begin : begin + len(draft) + 1]
        right = 0
        while right < len(draft) and own[right] == draft[right]:
            right += 1
        assert (list(path), tokens) == (list(range(begin, begin + right + 1)), own[: right + 1])
        begin += len(own)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    size = draw(st.integers(1, 9))
    return [draw(st.integers(0, 2)) for _ in range(size)], [draw(st.integers(-1, i - 1)) for i in range(size)]


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    """The nodes from a tree's root to this one, by the definition."""
    return [] if node < 0 else [*path_to(parents[node], parents), node]


@given(st.lists(trees() | st.just(([], [])), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_tree_is_walked_from_its_root(drafts: list[tuple[list[int], list[int]]], rng: object) -> None:
    places = SampledRows.of([d for d, _ in drafts], np.arange(len(drafts)), [p for _, p in drafts])
    sampled = [rng.randint(0, 2) for _ in places.rows]  # type: ignore[attr-defined]
    begin = 0
    for (draft, parents), (rows, tokens) in zip(drafts, places.accepted(sampled, ()), strict=True):
        best: list[int] = []  # the longest path whose every token is what was sampled before it
        twins = list(zip(parents, draft, strict=True))  # of equal ones after the same token the first counts
        for node in range(len(draft)):
            path = path_to(node, parents)
            before = [-1, *path[:-1]]
            right = all(draft[n] == sampled[begin + b + 1] for n, b in zip(path, before, strict=True))
            right = right and all(twins.index(twins[n]) == n for n in path)
            if right and len(path) > len(best):
                best = path
        assert tokens == [sampled[begin + n + 1] for n in [-1, *best]]
        assert list(rows) == [begin, *(begin + n + 1 for n in best)]
        for node in range(len(draft)):
            path = path_to(node, parents)
            row = begin + node + 1
            assert places.depths[row] == len(path)
            if any(parents):
                assert list(places.ahead()[row]) == [draft[n] for n in path]
                bits = sum(1 << (n + 1) for n in path) | 1
                assert words_of(parents)[node + 1] == bits
        begin += len(draft) + 1


def test_the_last_bit_of_a_word_is_its_sign() -> None:
    words = words_of(range(-1, 62))
    assert words[62] == 2**63 - 1 and words[63] == -1 and depths_of(range(-1, 62)) == list(range(64))


# -- in distribution ---------------------------------------------------------------------------------------

Rule = Callable[[int, np.ndarray, np.ndarray, np.random.Generator], list[list[int]]]
"""(draft, tokens drawn after the last known one [N], after the draft [N]) -> tokens emitted"""


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(3)
    return tuple(torch.from_numpy(rng.normal(0, 1.2, V).astype(np.float32)) for _ in range(2))  # type: ignore[return-value]


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """[N] tokens each of two positions, by the sampler of the engine, a seed per sequence."""
    p, q = distributions()
    rows = SamplingRows(N, V, [], torch.device("cpu"))
    for i in range(N):
        rows.add(i, SamplingParams(temperature=1.0), 1000 + i, [], [])
    index = np.repeat(np.arange(N), 2)
    logits = torch.stack([p, q]).repeat(N, 1)
    tokens, _ = sample(logits, rows, index, np.tile([5, 6], N), np.tile([0, 1], N))
    return tokens.numpy()[::2], tokens.numpy()[1::2]


def real(draft: int, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> list[list[int]]:
    places = SampledRows.of([(draft,)] * N, np.arange(N))
    sampled = np.stack([first, second], axis=1).ravel().tolist()
    return [tokens for _, tokens in places.accepted(sampled, ())]


def wrong_residual(
    draft: int, first: np.ndarray, second: np.ndarray, rng: np.random.Generator
) -> list[list[int]]:
    """A rejected draft's place is drawn once more, the draft not left out."""
    p = torch.softmax(distributions()[0].double(), 0).numpy()
    again = rng.choice(V, N, p=p / p.sum())
    return [[a, b] if a == draft else [c] for a, b, c in zip(first, second, again, strict=True)]


def zeroed_in_place(
    draft: int, first: np.ndarray, second: np.ndarray, rng: np.random.Generator
) -> list[list[int]]:
    """The rejected token's probability stays 0 for the next row."""
    q = torch.softmax(distributions()[1].double(), 0).numpy()
    q[draft] = 0
    other = rng.choice(V, N, p=q / q.sum())
    return [[a, b] if a == draft else [a] for a, b in zip(first, other, strict=True)]


def keep_depends_on_sample(
    draft: int, first: np.ndarray, second: np.ndarray, rng: np.random.Generator
) -> list[list[int]]:
    """The token after an accepted draft is given up where it is an unlikely one."""
    q = torch.softmax(distributions()[1].double(), 0).numpy()
    return [[a, b] if a == draft and q[b] > 1 / V else [a] for a, b in zip(first, second, strict=True)]


def fits(tokens: Sequence[int], p: np.ndarray) -> bool:
    """Pearson's test at ALPHA, cells of fewer than 5 expected put together."""
    counts = np.bincount(np.asarray(tokens), minlength=len(p)).astype(float)
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    if counts[~kept].sum():
        return False
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    return statistic < chi2.isf(ALPHA, kept.sum() - 1)


def holds(rule: Rule) -> dict[str, bool]:
    p, q = (torch.softmax(x.double(), 0).numpy() for x in distributions())
    draft = int(p.argmax())
    out = rule(draft, *drawn(), np.random.default_rng(0))
    rejected = p.copy()
    rejected[draft] = 0
    return {
        "first token": fits([t[0] for t in out], p),
        "rejected token": fits([t[0] for t in out if t[0] != draft], rejected),
        "bonus token": fits([t[1] for t in out if len(t) > 1], q),
        "pair": fits([t[0] * V + t[1] for t in out if len(t) > 1], np.outer(np.eye(V)[draft], q).ravel()),
    }


def test_what_is_emitted_is_distributed_as_the_target_draws() -> None:
    assert all(holds(real).values()), holds(real)


@pytest.mark.parametrize(
    ("rule", "caught"),
    [
        (wrong_residual, "first token"),
        (zeroed_in_place, "bonus token"),
        (keep_depends_on_sample, "bonus token"),
    ],
)
def test_wrong_rules_are_caught(rule: Rule, caught: str) -> None:
    assert not holds(rule)[caught]


def test_greedy_takes_the_lowest_of_equals_in_every_row() -> None:
    """A draft that is another of the equals is wrong, as decoding one by one would not say it."""
    logits = torch.zeros(2, V)
    logits[:, [4, 9]] = 1.0
    rows = SamplingRows(1, V, [], torch.device("cpu"))
    rows.add(0, SamplingParams(temperature=0), 0, [], [])
    places = SampledRows.of([(9,)], np.array([0]))
    tokens, _ = sample(logits, rows, places.rows, np.array([3, 4]), places.offsets)
    assert list(places.accepted(tokens.tolist(), ())) == [(range(1), [4])]
