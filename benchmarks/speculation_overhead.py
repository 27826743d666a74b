"""What speculation costs the policy: microseconds of the controller a step, and of the suffix proposer a token.

    python benchmarks/speculation_overhead.py

Controller: 128 decoding sequences of two match lengths, 8 draft tokens each; plan and record apart, fits included.
Proposer: 64 sequences of 500 tokens of English in turn, a corpus of finished ones behind them, a draft of 16 after
every token. Medians of blocks.
"""

from __future__ import annotations

import pydoc_data.topics
import statistics
import time
from collections.abc import Callable

import numpy as np
from common import save

from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.draft import MAX_DEPTH, StepRecord, StepView
from llmtool.core.speculation.suffix import SuffixProposer
from llmtool.sim.cost import H100_LLAMA_8B

BATCH, STEPS, BLOCKS = 128, 200, 15


def per_call(work: Callable[[], object]) -> float:
    """Microseconds."""
    started = time.perf_counter()
    for _ in range(STEPS):
        work()
    return 1e6 * (time.perf_counter() - started) / STEPS


def controller() -> dict[str, float]:
    rng = np.random.default_rng(0)
    auto = AutoController()
    matches = np.repeat([3, 20], BATCH // 2)
    view = StepView(matches, np.full(BATCH, 8), np.zeros(BATCH, np.int64), 100_000)
    chance = np.repeat([0.5, 0.85], BATCH // 2)

    def step() -> StepRecord:
        lengths = auto.plan(view)
        wrong = rng.random((BATCH, 8)) >= chance[:, None]
        right = np.where(wrong.any(axis=1), wrong.argmax(axis=1), 8)
        emitted = np.minimum(right, lengths) + 1
        seconds = H100_LLAMA_8B.seconds(BATCH + int(lengths.sum()), view.kv_tokens, BATCH)
        return StepRecord(view, lengths, emitted, np.minimum(right, emitted), seconds)

    for _ in range(300):
        auto.record(step())
    record = step()
    return {
        "plan_us": statistics.median(per_call(lambda: auto.plan(view)) for _ in range(BLOCKS)),
        "record_us": statistics.median(per_call(lambda: auto.record(record)) for _ in range(BLOCKS)),
    }


def proposer() -> dict[str, float]:
    words = " ".join(pydoc_data.topics.topics.values()).split()
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokens = [ids[word] for word in words]
    suffix, spent = SuffixProposer(), []
    for i in range(64):
        part = tokens[500 * i % (len(tokens) - 600) :][:600]
        suffix.begin("a", part[:100])
        started = time.perf_counter()
        for token in part[100:]:
            suffix.observe("a", [token])
            suffix.propose("a", MAX_DEPTH)
        spent.append(1e6 * (time.perf_counter() - started) / (len(part) - 100))
        suffix.finish("a")
    return {"observe_and_propose_us": statistics.median(spent), "corpus_tokens": suffix.held_tokens}


if __name__ == "__main__":
    save("speculation_overhead", {"controller": controller(), "suffix": proposer()})
