"""Log-probabilities from raw logits: of given tokens, their ranks, and the k most likely tokens.

"Raw" is the model's own distribution, before grammar masks, biases, penalties, temperature and filters: vLLM's
default (`--logprobs-mode raw_logprobs`), and what lm-eval expects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmtool.core.request import TokenLogprob

# A prompt chunk's logits are made in pieces of this many rows: 64 rows of a 150k vocabulary are 38 MB.
ROWS_AT_ONCE = 64


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """One TokenLogprob per row.

    logits: [S, V] float32. tokens: [S] int64, to report. counts: how many of the best to list, per row.
    """
    if not counts:
        return []
    lse = logits.logsumexp(dim=1, keepdim=True)  # [S, 1]
    chosen = logits.gather(1, tokens[:, None])  # [S, 1]
    ranks = (logits > chosen).sum(dim=1) + 1  # [S]
    width = min(max(counts), logits.shape[1])
    if width:
        best, ids = logits.topk(width, dim=1)  # [S, width] each
        best_logprobs, best_ids = (best - lse).tolist(), ids.tolist()
    else:
        best_logprobs = best_ids = [[] for _ in counts]
    chosen_logprobs = (chosen - lse).squeeze(1).tolist()
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(row_ids[:k], row_logprobs[:k], strict=True)))
        for token, logprob, rank, row_ids, row_logprobs, k in zip(
            tokens.tolist(), chosen_logprobs, ranks.tolist(), best_ids, best_logprobs, counts, strict=True
        )
    ]
