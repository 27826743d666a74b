"""Log-probabilities in the three shapes clients know: completions', chat's, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmtool.core.request import TokenLogprob
from llmtool.models.tokenizer import Tokenizer

_FLOOR = -9999.0  # JSON has no -inf; OpenAI's number for "practically impossible"


class TokenNames:
    """Token ids as the text shown in logprobs. as_ids: "token_id:5" instead, which is unambiguous."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token: int) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        return self._tokenizer.token_bytes(token).decode("utf-8", errors="replace")

    def bytes(self, token: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token))


def completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], names: TokenNames, offset: int = 0
) -> dict[str, Any]:
    """OpenAI's legacy shape: parallel lists. offset: characters before the first token."""
    tokens: list[str] = []
    offsets: list[int] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token, entry in zip(token_ids, logprobs, strict=False):
        text = names(token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else max(entry.logprob, _FLOOR))
        tops.append(None if entry is None else _top(entry, names))
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def _top(entry: TokenLogprob, names: TokenNames) -> dict[str, float]:
    """The best tokens and the chosen one. Different ids can read the same: the better one is kept."""
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        top.setdefault(names(token), max(logprob, _FLOOR))
    return top


def chat_logprobs(logprobs: Sequence[TokenLogprob], names: TokenNames) -> list[dict[str, Any]]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": names(token), "logprob": max(logprob, _FLOOR), "bytes": names.bytes(token)}

    return [
        one(entry.token, entry.logprob)
        | {"top_logprobs": [one(token, logprob) for token, logprob in entry.top]}
        for entry in logprobs
    ]


def prompt_logprobs(
    logprobs: Sequence[TokenLogprob | None], names: TokenNames
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's shape: per position token id -> logprob, rank, text; null for the first token."""
    rows: list[dict[str, dict[str, Any]] | None] = []
    for entry in logprobs:
        if entry is None:
            rows.append(None)
            continue
        row: dict[str, dict[str, Any]] = {}
        for rank, (token, logprob) in enumerate(entry.top, 1):
            row[str(token)] = {"logprob": max(logprob, _FLOOR), "rank": rank, "decoded_token": names(token)}
        row.setdefault(
            str(entry.token),
            {"logprob": max(entry.logprob, _FLOOR), "rank": entry.rank, "decoded_token": names(entry.token)},
        )
        rows.append(row)
    return rows
