"""Datasets made here or read from files, all as lists of `BenchRequest`. Timed traces are in traces.py.

Everything is a function of its arguments and the Generator passed in: the same seed gives the same requests.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from llmtool.errors import UsageError
from llmtool.workload.files import bad_line, integer, json_document, jsonl_rows
from llmtool.workload.requests import BenchRequest, Tokenizer, TokenSource, need

# Filters of the ShareGPT sampler that vLLM's and SGLang's benchmarks share: tiny and huge turns measure
# nothing.
SHAREGPT_MIN_TOKENS = 4
SHAREGPT_MAX_PROMPT = 1024
SHAREGPT_MAX_TOTAL = 2048
COPY_ASK = "Repeat the following text exactly, word for word, and nothing else:\n\n"


def random_requests(
    n: int,
    source: TokenSource,
    rng: np.random.Generator,
    input_len: int = 1024,
    output_len: int = 128,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> list[BenchRequest]:
    """Random token ids; lengths uniform in [len * (1 - ratio), len * (1 + ratio)], as vLLM's `random`
    dataset.

    prefix_len: tokens that all requests share, before the input_len others.
    """
    if not 0.0 <= range_ratio < 1.0:
        raise UsageError(f"The range ratio must be in [0, 1), not {range_ratio:g}.")
    _at_least(1, input_len=input_len, output_len=output_len)
    _at_least(0, prefix_len=prefix_len)
    inputs = _lengths(n, input_len, range_ratio, rng)
    outputs = _lengths(n, output_len, range_ratio, rng)
    prefix = source.random(prefix_len, rng)
    return [
        _token_request(prefix + source.random(int(i), rng), int(o))
        for i, o in zip(inputs, outputs, strict=True)
    ]


def prefix_requests(
    n: int,
    source: TokenSource,
    rng: np.random.Generator,
    prefix_len: int = 256,
    suffix_len: int = 256,
    num_prefixes: int = 10,
    output_len: int = 128,
) -> list[BenchRequest]:
    """English prompts that share one of `num_prefixes` prefixes, in shuffled order: vLLM's
    `prefix_repetition`.
    """
    _at_least(1, prefix_len=prefix_len, num_prefixes=num_prefixes, output_len=output_len)
    _at_least(0, suffix_len=suffix_len)
    prefixes = [source.passage(prefix_len, rng) for _ in range(num_prefixes)]
    # Every prefix equally often (up to one); the order must not put equal prefixes side by side.
    order = rng.permutation(n) % num_prefixes
    return [_token_request(prefixes[p] + source.passage(suffix_len, rng), output_len) for p in order]


def copy_requests(
    n: int, source: TokenSource, rng: np.random.Generator, passage_len: int = 160, output_len: int = 128
) -> list[BenchRequest]:
    """The answer stands in the prompt ("repeat this text"): the best case for lookup speculation. About
    `passage_len` tokens of English each, as chat messages, so that an instruction model really copies."""
    _at_least(1, passage_len=passage_len, output_len=output_len)
    return [
        BenchRequest(
            messages=({"role": "user", "content": COPY_ASK + source.text(source.passage(passage_len, rng))},),
            max_tokens=output_len,
        )
        for _ in range(n)
    ]


def sharegpt_requests(
    path: str | Path,
    n: int,
    rng: np.random.Generator,
    tokenizer: Tokenizer | None,
    output_len: int | None = None,
) -> list[BenchRequest]:
    """First question and answer of each conversation of a ShareGPT JSON file; the answer's length is asked
    for.

    output_len: use this instead of the answers' lengths; no tokenizer is needed then. Very short and very
    long turns are left out, as in vLLM's sampler. Shuffled, and repeated when the file has fewer than `n`.
    """
    document = json_document(path)
    if not isinstance(document, list):
        raise bad_line(path, 1, f"a JSON list of conversations, not {type(document).__name__}")
    if output_len is None:
        need(tokenizer, "to measure ShareGPT answers (or give --output-len)")
    pairs = [pair for pair in (_first_turns(path, i, entry) for i, entry in enumerate(document)) if pair]

    def make(pair: tuple[str, str]) -> BenchRequest | None:
        prompt, answer = pair
        if tokenizer is None:
            return BenchRequest(text=prompt, max_tokens=output_len)
        prompt_len = len(tokenizer.encode(prompt))
        wanted = len(tokenizer.encode(answer)) if output_len is None else output_len
        fits = (
            SHAREGPT_MIN_TOKENS <= prompt_len <= SHAREGPT_MAX_PROMPT
            and prompt_len + wanted <= SHAREGPT_MAX_TOTAL
        )
        if not fits or (output_len is None and wanted < SHAREGPT_MIN_TOKENS):
            return None
        return BenchRequest(text=prompt, max_tokens=wanted, prompt_len=prompt_len)

    # Stop tokenizing when `n` are found: the real file has 90,000 conversations.
    chosen: list[BenchRequest] = []
    for i in rng.permutation(len(pairs)):
        if len(chosen) == n:
            break
        request = make(pairs[i])
        if request is not None:
            chosen.append(request)
    if not chosen:
        raise UsageError(
            f"{path} has no usable conversation.",
            "Each needs a question and an answer of 4 to ~1,000 tokens.",
        )
    return _fill(chosen, n, rng)


def _first_turns(path: str | Path, index: int, entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise UsageError(f"{path}, conversation {index}: expected an object with a list 'conversations'.")
    texts = []
    for turn in turns[:2]:
        value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(value, str):
            raise UsageError(
                f'{path}, conversation {index}: expected turns as {{"from": ..., "value": text}}.'
            )
        texts.append(value)
    return (texts[0], texts[1]) if len(texts) == 2 else None


def custom_requests(
    path: str | Path,
    n: int,
    rng: np.random.Generator,
    tokenizer: Tokenizer | None = None,
    output_len: int | None = None,
    default_output_len: int = 128,
    shuffle: bool = True,
) -> list[BenchRequest]:
    """A JSONL file: {"prompt": text or token ids} or {"messages": [...]}, with "output_len" or "max_tokens",
    optionally "timestamp" (seconds) and "extra" (fields for the request body).

    output_len overrides the file's lengths. Rows that carry timestamps stay in order and are not repeated.
    """
    rows = [
        _custom_request(path, line, row, tokenizer, output_len, default_output_len)
        for line, row in jsonl_rows(path)
    ]
    if not rows:
        raise UsageError(f"{path} has no request.", 'Each line is {"prompt": ..., "output_len": ...}.')
    if all(r.arrival is not None for r in rows):
        return sorted(rows, key=lambda r: r.arrival or 0.0)[:n]
    order = rng.permutation(len(rows)) if shuffle else np.arange(len(rows))
    return _fill([rows[i] for i in order[:n]], n, rng if shuffle else None)


def _custom_request(
    path: str | Path,
    line: int,
    row: dict[str, Any],
    tokenizer: Tokenizer | None,
    output_len: int | None,
    default_output_len: int,
) -> BenchRequest:
    key = next((k for k in ("output_len", "max_tokens", "output_tokens") if row.get(k) is not None), None)
    wanted = output_len or (integer(path, line, row, key, 1) if key else default_output_len)
    extra = row.get("extra", {})
    if not isinstance(extra, dict):
        raise bad_line(path, line, "'extra' to be an object of request fields")
    stamp = row.get("timestamp")
    if stamp is not None and not (isinstance(stamp, (int, float)) and 0 <= stamp < math.inf):
        raise bad_line(path, line, f"'timestamp' to be seconds, not {stamp!r}")
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
        return BenchRequest(messages=tuple(messages), max_tokens=wanted, arrival=stamp, extra=extra)
    if isinstance(prompt, str) and prompt:
        prompt_len = len(tokenizer.encode(prompt)) if tokenizer else None
        return BenchRequest(text=prompt, max_tokens=wanted, arrival=stamp, prompt_len=prompt_len, extra=extra)
    if isinstance(prompt, list) and prompt and all(type(t) is int and t >= 0 for t in prompt):
        return BenchRequest(
            token_ids=tuple(prompt), max_tokens=wanted, arrival=stamp, prompt_len=len(prompt), extra=extra
        )
    raise bad_line(path, line, "'prompt' (text or a list of token ids) or 'messages' (a list with roles)")


def _fill(requests: list[BenchRequest], n: int, rng: np.random.Generator | None) -> list[BenchRequest]:
    """Exactly `n` requests: the list again and again, each pass in a new order."""
    out = list(requests[:n])
    while len(out) < n:
        order = rng.permutation(len(requests)) if rng is not None else range(len(requests))
        out += [requests[i] for i in order][: n - len(out)]
    return out


def _lengths(n: int, length: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    low, high = max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))
    return rng.integers(low, high + 1, size=n)


def _token_request(ids: list[int], output_len: int) -> BenchRequest:
    return BenchRequest(token_ids=tuple(ids), prompt_len=len(ids), max_tokens=output_len)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, not {value}.")
