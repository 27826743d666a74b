"""Verification of drafts against a walk through them, and whole generations against decoding token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from llmtool_kernels.gpu.verify import MAX_ROWS, draw, verify, verify_reference

from llmtool.runtime.random import uniforms
from tests.kernels.gpu.pages import random_tree

VOCAB = 5


def case(
    lens: list[int], tree: bool, device: torch.device, seed: int, vocab: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    tokens, inputs = (torch.randint(vocab, (sum(lens),), generator=generator) for _ in range(2))
    starts = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)
    words = [word for i, n in enumerate(lens) for word in random_tree(n, seed + i)]
    bits = torch.tensor([w if w < 2**63 else w - 2**64 for w in words]) if tree else None
    on = None if bits is None else bits.to(device)
    return tokens.to(device), inputs.to(device), starts.to(device), lens, on


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_verdicts_are_the_references(device: torch.device, tree: bool, vocab: int) -> None:
    """Few different tokens, so that many drafts are right, and some twice; up to all 64 bits of a word."""
    for seed, lens in enumerate(([1, 2, 5, 8], [9, 16, 3], [MAX_ROWS, 1, 33], [1])):
        arguments = case(list(lens), tree, device, seed, vocab)
        ours = verify(*arguments)
        expected = verify_reference(*arguments)
        assert ours.accepted.tolist() == expected.accepted.tolist()
        assert ours.bonus.tolist() == expected.bonus.tolist()
        assert ours.kept.tolist() == expected.kept.tolist()
        if vocab == 1 and not tree:
            assert ours.accepted.tolist() == [n - 1 for n in lens]


def test_more_rows_than_bits_are_refused(device: torch.device) -> None:
    with pytest.raises(AssertionError, match="1 to 64 rows"):
        verify(*case([MAX_ROWS + 1], False, device, 0, 2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", [False, True])
def test_what_is_generated_does_not_depend_on_the_drafts(
    device: torch.device, tree: bool, temperature: float
) -> None:
    """A model whose logits depend on the last two tokens; drafts at random, some of them right by luck."""
    table = torch.randn(VOCAB, VOCAB, VOCAB).round(decimals=1)  # with equal logits
    seed, length = 7, 30

    def expected() -> list[int]:
        tokens = [0, 1]
        while len(tokens) < length:
            logits = table[tokens[-2], tokens[-1]].double()
            if temperature == 0:
                tokens.append(int((logits == logits.max()).nonzero()[0]))
                continue
            cdf = ((logits - logits.max()) / temperature).exp().cumsum(0)
            u = uniforms(np.array([seed], np.uint64), np.array([len(tokens)]))[0]
            tokens.append(int(torch.searchsorted(cdf, u * cdf[-1], right=True)))
        return tokens

    rng, tokens, steps = random.Random(3), [0, 1], 0
    while len(tokens) < length:
        n = rng.randint(1, 8)
        words = random_tree(n, seed=rng.randrange(100)) if tree else [(2 << j) - 1 for j in range(n)]
        rows = [tokens[-1], *(rng.randrange(VOCAB) for _ in range(n - 1))]
        before, depth = [], []
        for j, word in enumerate(words):
            ancestors = [i for i in range(j) if word >> i & 1]
            before.append(rows[ancestors[-1]] if ancestors else tokens[-2])
            depth.append(len(ancestors))
        logits = table[torch.tensor(before), torch.tensor(rows)].to(device)
        positions = torch.tensor([len(tokens) + d for d in depth], device=device)
        seeds, temperatures = (
            torch.full((n,), seed, device=device),
            torch.full((n,), temperature, device=device),
        )
        verdict = verify(
            draw(logits, seeds, positions, temperatures),
            torch.tensor(rows, device=device),
            torch.tensor([0, n], dtype=torch.int32, device=device),
            [n],
            torch.tensor(words, device=device) if tree else None,
        )
        kept = [j for j in range(n) if int(verdict.kept[0]) >> j & 1]
        assert len(kept) == int(verdict.accepted[0]) + 1
        tokens += [*(rows[j] for j in kept[1:]), int(verdict.bonus[0])]
        steps += 1
    assert tokens[:length] == expected()
    assert steps < length - 2  # some drafts were right
