from __future__ import annotations

import pytest
import torch

from llmtool.runtime.logprobs import token_logprobs


def test_logprobs_ranks_and_best_equal_a_sorted_log_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 40) * 3
    tokens = torch.tensor([0, 7, 39, 12, 3])
    counts = [0, 1, 5, 100, 2]
    reference = torch.log_softmax(logits.double(), dim=1)
    for i, got in enumerate(token_logprobs(logits, tokens, counts)):
        order = reference[i].argsort(descending=True).tolist()
        assert got.token == tokens[i]
        assert got.rank == order.index(got.token) + 1
        assert got.logprob == pytest.approx(reference[i, got.token].item(), abs=1e-5)
        k = min(counts[i], 40)
        assert [t for t, _ in got.top] == order[:k]
        assert [p for _, p in got.top] == pytest.approx(reference[i, order[:k]].tolist(), abs=1e-5)


def test_rank_counts_strictly_better_tokens() -> None:
    got = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 3.0]]), torch.tensor([2]), [0])
    assert got[0].rank == 2
    assert got[0].top == ()


def test_no_rows() -> None:
    assert token_logprobs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), []) == []
