"""Prefix-cache hit rates of the two-level allocator, beside a full-attention model and an optimal eviction.

Simulated: the allocator itself, no model, exact on any machine. Contexts of 8,000 tokens, pages of 16; the arena
holds what 12 such sessions need at the least (the bytes that decoding at their end reads). The hit rate is the part
of what a prompt shares with an earlier one that need not be computed again.

- doc-qa D x Q: D documents, Q rounds of one question each about every document; of rounds after the first.
- branch S: a prompt that parts from one of S sessions at a random place, 64 times.
- cyclic: 14 documents (117 % of the arena) in turn, five rounds; of rounds after the first.
- multi-turn S: S conversations of 8,000 tokens that grow turn by turn, in random order.
- optimal: what no eviction could beat, by knowing the future: blocks of a full-attention model in as many bytes
  as 12 sessions take, the block wanted again last going first (Belady). A model that keeps less than
  full attention has room for more sessions, and may still beat it.

python benchmarks/memory_hits.py
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from common import save

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.page_plan import plan_pages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.sim.catalogue import geometry_of

CONTEXT, SESSIONS, BLOCK, STEP = 8000, 12, 16, 512
MODELS = ("llama-3.1-8b", "gemma-3-27b", "gpt-oss-20b", "falcon-h1-1.5b", "lfm2-1.2b")


@dataclass(frozen=True, slots=True)
class Prompt:
    """shared: leading tokens that an earlier prompt had too; 0: not counted. answer: tokens that follow."""

    tokens: list[int]
    shared: int
    answer: int = 64


def fresh(draw: random.Random, count: int) -> list[int]:
    return [draw.getrandbits(31) for _ in range(count)]


def doc_qa(documents: int, rounds: int) -> list[Prompt]:
    draw = random.Random(1)
    texts = [fresh(draw, CONTEXT) for _ in range(documents)]
    return [
        Prompt(text + fresh(draw, 60), CONTEXT if turn else 0) for turn in range(rounds) for text in texts
    ]


def branch(sessions: int) -> list[Prompt]:
    draw = random.Random(2)
    texts = [fresh(draw, CONTEXT) for _ in range(sessions)]
    prompts = [Prompt(text, 0) for text in texts]
    for _ in range(64):
        cut = draw.randrange(BLOCK, CONTEXT)
        prompts.append(Prompt(draw.choice(texts)[:cut] + fresh(draw, 200), cut))
    return prompts


def multi_turn(sessions: int) -> list[Prompt]:
    """The answer is part of the next prompt."""
    draw = random.Random(3)
    histories = [fresh(draw, CONTEXT - 2400) for _ in range(sessions)]
    prompts: list[Prompt] = []
    known = [0] * sessions
    for _ in range(8):
        for i in draw.sample(range(sessions), sessions):
            text = histories[i] + fresh(draw, 100)
            answer = fresh(draw, 200)
            prompts.append(Prompt(text, known[i], 200))
            histories[i] = text + answer
            known[i] = len(histories[i])
            prompts[-1].tokens.extend(answer)  # the tokens that will be generated
    return prompts


WORKLOADS = {
    "doc-qa 4 x 4": doc_qa(4, 4),
    "doc-qa 8 x 2": doc_qa(8, 2),
    "doc-qa 8 x 4": doc_qa(8, 4),
    "doc-qa 11 x 4": doc_qa(11, 4),
    "branch 4": branch(4),
    "branch 8": branch(8),
    "cyclic 117 %": doc_qa(14, 5),
    "multi-turn 11": multi_turn(11),
}


def replay(name: str, prompts: Sequence[Prompt], generated: bool) -> float:
    """generated: the last `answer` tokens of a prompt come one by one."""
    plan = plan_pages(geometry_of(name), BLOCK)
    room = SESSIONS * plan.geometry.live_bytes(CONTEXT)
    a = TwoLevelAllocator(plan, room // plan.large_page, step_tokens=STEP)
    hits = wanted = 0
    for i, prompt in enumerate(prompts):
        tokens, seq = prompt.tokens, f"r{i}"
        first = len(tokens) - prompt.answer if generated else len(tokens)
        known = tokens[:first]
        try:
            hit = a.begin(seq, known, STEP)
        except OutOfPages as lack:
            raise SystemExit(f"{name}: {lack}") from None
        if prompt.shared:
            hits += min(hit, prompt.shared)
            wanted += prompt.shared
        at = min(first, hit + STEP)
        a.advance(seq, at)
        while at < first:
            at = min(first, at + STEP)
            a.extend(seq, at)
            a.advance(seq, at)
        for token in tokens[first:] if generated else [7] * prompt.answer:
            known.append(token)
            a.extend(seq, len(known))
            a.advance(seq, len(known))
        a.end(seq)
    return 100 * hits / wanted


def optimal(prompts: Sequence[Prompt]) -> float:
    """Blocks by what comes before them; the one whose next use lies furthest ahead goes first, and the deepest."""
    capacity = SESSIONS * CONTEXT // BLOCK
    paths = [list(_blocks(prompt.tokens)) for prompt in prompts]
    uses: dict[int, list[int]] = {}
    for when, path in reversed(list(enumerate(paths))):
        for key in path:
            uses.setdefault(key, []).append(when)
    cached: dict[int, int] = {}  # key -> next use
    heap: list[tuple[int, int, int]] = []
    hits = wanted = 0
    for prompt, path in zip(prompts, paths, strict=True):
        length = 0
        while length < len(path) and path[length] in cached:
            length += 1
        if prompt.shared:
            hits += min(length * BLOCK, prompt.shared)
            wanted += prompt.shared
        for depth, key in enumerate(path):
            uses[key].pop()
            cached[key] = uses[key][-1] if uses[key] else 1 << 30
            heappush(heap, (-cached[key], -depth, key))
        while len(cached) > capacity:
            when, _, key = heappop(heap)
            if cached.get(key) == -when:
                del cached[key]
    return 100 * hits / wanted


def _blocks(tokens: Sequence[int]) -> Iterator[int]:
    parent = 0
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hash((parent, *tokens[start : start + BLOCK]))
        yield parent


def main() -> None:
    rows = {}
    for workload, prompts in WORKLOADS.items():
        generated = workload.startswith("multi")
        row = {name: round(replay(name, prompts, generated), 1) for name in MODELS}
        rows[workload] = {**row, "optimal, full attention": round(optimal(prompts), 1)}
        sys.stderr.write(f"{workload}: {rows[workload]}\n")
    save("memory_hits", {"simulated": True, "hit_rate_percent": rows})


if __name__ == "__main__":
    main()
