"""What the two-level allocator costs in CPU time, on Gemma-3-27B's seven block tables.

- step: `extend` and `advance` of one decoding request, 256 together, per request and step, over 512 steps.
- begin: a prompt of 2,000 tokens that is cached, all its pages taken over; unseen: of one that is not, all its
  pages taken.
- hashing, lookup: the same prompt's hashes alone, and finding its longest hit once they are known.

python benchmarks/memory_cost.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

from common import save

from llmtool.core.memory.hashing import chain, root_hash
from llmtool.core.memory.page_plan import plan_pages
from llmtool.core.memory.sequence_pages import SequencePages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.sim.catalogue import geometry_of

REQUESTS, STEPS, PROMPT = 256, 512, 2000


def allocator(tokens: int) -> TwoLevelAllocator:
    plan = plan_pages(geometry_of("gemma-3-27b"))
    a = TwoLevelAllocator(plan, 1)
    return TwoLevelAllocator(plan, REQUESTS * a.pages_for(tokens))


def step() -> float:
    """Microseconds per request and step."""
    a = allocator(PROMPT + STEPS)
    prompts = [[i, *range(PROMPT - 1)] for i in range(REQUESTS)]
    names = [f"r{i}" for i in range(REQUESTS)]
    for name, tokens in zip(names, prompts, strict=True):
        a.begin(name, tokens, PROMPT)
        a.advance(name, PROMPT)
    started = time.perf_counter()
    for n in range(PROMPT + 1, PROMPT + 1 + STEPS):
        for name, tokens in zip(names, prompts, strict=True):
            tokens.append(n)
            a.extend(name, n)
            a.advance(name, n)
    return (time.perf_counter() - started) / REQUESTS / STEPS * 1e6


def begin(cached: bool) -> float:
    """Microseconds of one `begin`."""
    a, took = allocator(PROMPT), []
    for i in range(20):
        tokens = [0 if cached else i, *range(PROMPT - 1)]
        started = time.perf_counter()
        hit = a.begin("x", tokens, PROMPT)
        took.append(time.perf_counter() - started)
        assert hit == (PROMPT - a.block if cached and i else 0)
        a.advance("x", PROMPT)
        a.end("x")
    return statistics.median(took[1:]) * 1e6


def hashing() -> float:
    """Microseconds of the hashes of a prompt."""
    tokens, took = list(range(PROMPT)), []
    for _ in range(20):
        started = time.perf_counter()
        chain([], root_hash(""), tokens, 16, PROMPT // 16)
        took.append(time.perf_counter() - started)
    return statistics.median(took) * 1e6


def lookup() -> float:
    """Microseconds of finding the longest hit of a cached prompt whose hashes are known."""
    a, tokens, took = allocator(PROMPT), list(range(PROMPT)), []
    a.begin("x", tokens, PROMPT)
    a.advance("x", PROMPT)
    a.end("x")
    state = SequencePages(tokens, root_hash(""), len(a.tables))
    for _ in range(20):
        started = time.perf_counter()
        hit = a.cache.longest_hit(state)
        took.append(time.perf_counter() - started)
        assert hit * a.block == PROMPT - a.block
    return statistics.median(took[1:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    runs = {
        "step_us_per_request": step,
        "begin_cached_us": lambda: begin(True),
        "begin_unseen_us": lambda: begin(False),
        "hashing_us": hashing,
        "lookup_us": lookup,
    }
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):  # interleaved
        for name, measure in runs.items():
            figures[name].append(measure())
    rows = {name: round(statistics.median(values), 2) for name, values in figures.items()}
    least = {f"{name}_least": round(min(values), 2) for name, values in figures.items()}
    print(rows, least)
    save("memory_cost", {"requests": REQUESTS, "prompt_tokens": PROMPT, "tables": 7, **rows, **least})


if __name__ == "__main__":
    main()
