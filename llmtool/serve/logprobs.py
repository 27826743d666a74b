"""Log-probabilities in the three shapes clients know: completions', chat's, and vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
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


class TextOffsets:
    """Where the tokens of one answer begin in its text, in characters.

    A character that several tokens make up counts once, when it is complete: all of them begin where it does.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def __call__(self, token: int) -> int:
        """The offset of the next token."""
        offset = self._offset
        self._offset += len(self._decoder.decode(bytes(self._names.bytes(token))))
        return offset


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    names: TokenNames,
    offset_of: TextOffsets | None = None,
) -> dict[str, Any]:
    """OpenAI's legacy shape: parallel lists. offset_of: of the answer that these tokens go on with."""
    offset_of = offset_of or TextOffsets(names)
    tokens: list[str] = []
    offsets: list[int] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token, entry in zip(token_ids, logprobs, strict=False):
        tokens.append(names(token))
        offsets.append(offset_of(token))
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
