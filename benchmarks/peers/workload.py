"""The requests every contender gets: token ids of the English that comes with Python, fixed by a seed.

single  512 tokens in, 128 out, one after the other
batch   64 at once, 32-512 in and 16-256 out, uniform
prefix  32 at once, 1,024 tokens in common and 16-64 of their own, 32 out
copy    320 tokens of text, then its first 192 again, which the model goes on copying, 128 out, one after the other
copy-16 the same, 32 of them, 16 at a time
online  as batch, with Poisson arrivals; each rate has prompts of its own, so that no rate finds another's cached
warm    a few of each kind, before anything is measured
Output lengths are exact: greedy, end tokens ignored. `quick` keeps the kinds and shrinks the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmtool.workload.requests import BenchRequest, Tokenizer, TokenSource

SEED = 20_240
RATES = (0.5, 1.0, 2.0, 4.0)  # requests per second
ONLINE = {0.5: 40, 1.0: 60, 2.0: 80, 4.0: 120}  # requests; at the lowest rate they arrive over 80 seconds
SINGLE_IN, SINGLE_OUT = 512, 128
PREFIX = 1024
PASSAGE, AGAIN, COPY_OUT = 320, 192, 128


@dataclass(frozen=True, slots=True)
class Load:
    """requests: each with token_ids and max_tokens. offsets: seconds after the start, as long. concurrency: of
    a closed loop, or None for all at their moments."""

    requests: tuple[BenchRequest, ...]
    offsets: tuple[float, ...]
    concurrency: int | None = None


def online(rate: float) -> str:
    """The name of the load at `rate` requests per second."""
    return f"online-{rate:g}"


def build(tokenizer: Tokenizer, quick: bool = False) -> dict[str, Load]:
    """All loads by name. tokenizer: the model's."""
    source, rng = TokenSource(tokenizer), np.random.default_rng(SEED)

    def request(prompt: list[int], out: int) -> BenchRequest:
        return BenchRequest(token_ids=tuple(prompt), max_tokens=out, prompt_len=len(prompt))

    def mixed() -> BenchRequest:
        prompt, out = int(rng.integers(32, 513)), int(rng.integers(16, 257))
        return request(source.passage(prompt, rng), out // 16 if quick else out)

    def at_once(requests: list[BenchRequest], concurrency: int | None = None) -> Load:
        return Load(tuple(requests), (0.0,) * len(requests), concurrency)

    singles, batch, shared = (1, 4, 2) if quick else (4, 64, 32)
    out = 8 if quick else SINGLE_OUT
    loads = {
        "warm": at_once(
            [request(source.passage(n, rng), 2 if quick else 8) for n in (SINGLE_IN, 64, 200, 32)], 2
        )
    }
    loads["single"] = at_once([request(source.passage(SINGLE_IN, rng), out) for _ in range(singles)], 1)
    loads["batch"] = at_once([mixed() for _ in range(batch)])
    prefix = source.passage(PREFIX, rng)
    own = [source.passage(int(rng.integers(16, 65)), rng) for _ in range(shared)]
    loads["prefix"] = at_once([request(prefix + tail, 4 if quick else 32) for tail in own])
    for rate in RATES:
        count = 2 if quick else ONLINE[rate]
        gaps = rng.exponential(1 / rate, count)
        gaps[0] = 0.0
        offsets = tuple(float(t) for t in np.cumsum(gaps))
        loads[online(rate)] = Load(tuple(mixed() for _ in range(count)), offsets)
    for name, count, concurrency in (("copy", 8, 1), ("copy-16", 32, 16)):
        texts = [source.passage(PASSAGE, rng) for _ in range(2 if quick else count)]
        copies = [request([*text, *text[:AGAIN]], out if quick else COPY_OUT) for text in texts]
        loads[name] = at_once(copies, concurrency)
    return loads
