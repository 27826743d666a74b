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
- hindsight: the same for each model: what the prompts to come will read at the places where they part (blocks,
  windows, states) is kept in the same bytes, what is read again last goes first. It is told where prompts part,
  which nobody who serves them can know; points spread over a text may still do as well.
- mooncake: the recorded trace's first 1,500 prompts in turn, in blocks of its 512 tokens, by memory for a part of
  them in full attention; the hits are parts of all prompt tokens. lru: least recently used blocks of a
  full-attention model in as many bytes.

python benchmarks/memory_hits.py [--without-trace]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from common import save

from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.layer_policy import joint_longest_hit, live_blocks
from llmtool.core.memory.page_plan import plan_pages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.sim.catalogue import geometry_of

CONTEXT, SESSIONS, BLOCK, STEP = 8000, 12, 16, 512
MODELS = ("llama-3.1-8b", "gemma-3-27b", "gpt-oss-20b", "falcon-h1-1.5b", "lfm2-1.2b")
TRACED, REQUESTS = ("llama-3.1-8b", "gemma-3-27b", "lfm2-1.2b"), 1500  # of the recorded trace


@dataclass(frozen=True, slots=True)
class Prompt:
    """shared: leading tokens that an earlier prompt had too; 0: not counted. answer: tokens that follow. hints:
    ends of messages, as a server knows them."""

    tokens: list[int]
    shared: int
    answer: int = 64
    hints: tuple[int, ...] = ()


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
    ends = [[len(text)] for text in histories]
    for _ in range(8):
        for i in draw.sample(range(sessions), sessions):
            text = histories[i] + fresh(draw, 100)
            answer = fresh(draw, 200)
            prompts.append(Prompt(text, known[i], 200, (*ends[i], len(text))))
            ends[i] += [len(text), len(text) + 200]
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
            hit = a.begin(seq, known, STEP, hints=prompt.hints)
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


def hindsight(name: str, prompts: Sequence[Prompt]) -> float:
    """A block of a type, a state after a block: kept until the last prompt that reads it where it parts."""
    geometry = geometry_of(name)
    specs = [kind.spec for kind in geometry.types()]
    sizes = [
        sum(s.state_bytes or s.bytes_per_token * BLOCK for s in kind.layers) for kind in geometry.types()
    ]
    room, seen = SESSIONS * geometry.live_bytes(CONTEXT), set[int]()
    paths, parts = [list(_blocks(prompt.tokens)) for prompt in prompts], []
    for path in paths:
        part = 0
        while part < len(path) and path[part] in seen:
            part += 1
        parts.append(part)
        seen.update(path)
    uses: dict[tuple[int, int], list[int]] = {}
    for when in range(len(prompts) - 1, -1, -1):
        for kind, spec in enumerate(specs):
            for i in live_blocks(spec, parts[when], BLOCK):
                uses.setdefault((kind, paths[when][i]), []).append(when)
    cached: dict[tuple[int, int], int] = {}  # type and block -> next use
    heap: list[tuple[int, int, tuple[int, int]]] = []
    held = hits = wanted = 0
    for when, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        masks = [
            sum(1 << i for i, key in enumerate(path) if (kind, key) in cached) for kind in range(len(specs))
        ]
        length = joint_longest_hit(specs, masks, parts[when], BLOCK)
        if prompt.shared:
            hits += min(length * BLOCK, prompt.shared)
            wanted += prompt.shared
        for depth, key in enumerate(path):
            for kind, size in enumerate(sizes):
                item = (kind, key)
                later = uses.get(item, [])
                while later and later[-1] <= when:
                    later.pop()
                known = item in cached
                if not later:
                    held -= size * (cached.pop(item, None) is not None)
                elif known or depth >= length or specs[kind].kind in ("full", "mla"):
                    held += size * (not known)
                    cached[item] = later[-1]
                    heappush(heap, (-later[-1], -depth, item))
        while held > room:
            next_use, _, item = heappop(heap)
            if cached.get(item) == -next_use:
                del cached[item]
                held -= sizes[item[0]]
    return 100 * hits / wanted


def mooncake(share: float) -> dict[str, float]:
    """Hits, percent of all prompt tokens. share: the memory, as a part of what all its blocks take."""
    path = Path(os.environ.get("LLMTOOL_DATA", "../shared/data")) / "traces/mooncake_synthetic_trace.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is not there: set LLMTOOL_DATA, or give --without-trace.")
    ids = [json.loads(line)["hash_ids"] for line in path.read_text().splitlines()[:REQUESTS]]
    total = 512 * sum(map(len, ids))
    tokens = round(share * 512 * len({i for row in ids for i in row}))
    row: dict[str, float] = {}
    for name in MODELS:
        geometry = geometry_of(name)
        plan = plan_pages(geometry, 512)
        room = geometry.live_bytes(tokens)
        a = TwoLevelAllocator(plan, room // plan.large_page, step_tokens=8192)
        hits = 0
        for n, blocks in enumerate(ids):
            prompt = [token for i in blocks for token in [i] * 512] + [
                n,
                1 << 30,
            ]  # the last token is computed
            hit = a.begin(f"r{n}", prompt, 8192)
            hits += hit
            at = min(len(prompt), hit + 8192)
            a.advance(f"r{n}", at)
            while at < len(prompt):
                at = min(len(prompt), at + 8192)
                a.extend(f"r{n}", at)
                a.advance(f"r{n}", at)
            a.end(f"r{n}")
        row[name] = round(100 * hits / total, 1)
    recent: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in ids:
        found = 0
        while found < len(blocks) and blocks[found] in recent:
            found += 1
        hits += found
        for i in reversed(blocks):
            recent[i] = None
            recent.move_to_end(i)
        while len(recent) > tokens // 512:
            recent.popitem(last=False)
    return row | {"lru, full attention": round(100 * 512 * hits / total, 1)}


def _blocks(tokens: Sequence[int]) -> Iterator[int]:
    parent = 0
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hash((parent, *tokens[start : start + BLOCK]))
        yield parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-trace", action="store_true")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    for workload, prompts in WORKLOADS.items():
        generated = workload.startswith("multi")
        row = {name: round(replay(name, prompts, generated), 1) for name in MODELS}
        known = {name: round(hindsight(name, prompts), 1) for name in MODELS}
        rows[workload] = {**row, "optimal, full attention": round(optimal(prompts), 1), "hindsight": known}
        sys.stderr.write(f"{workload}: {rows[workload]}\n")
    trace = {}
    if not args.without_trace:
        for share in (0.1, 0.3):
            trace[f"{share:.0%} of its blocks"] = mooncake(share)
            sys.stderr.write(f"mooncake: {trace}\n")
    save("memory_hits", {"simulated": True, "hit_rate_percent": rows, "mooncake_percent": trace})


if __name__ == "__main__":
    main()
