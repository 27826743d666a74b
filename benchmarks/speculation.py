"""Speculation on a virtual clock: mean latency of each policy, by dataset and load, against the best fixed length.

    python benchmarks/speculation.py --record      # once: what SmolLM2 says to the prompts of LLMTOOL_DATA
    python benchmarks/speculation.py               # the table; cells are kept, so that it can be interrupted

The real scheduler, allocator, suffix proposer and controllers; steps last what the published line of Llama-3.1-8B
on an H100 says (`llmtool.sim.cost`); tokens are those that SmolLM2-135M-Instruct really said, so acceptance is that
of real text. Every policy gets the same requests at the same moments. Loads are shares of the rate that off
completes when everything is queued at once. Each request drafts from itself alone: there are fewer exchanges than
requests, and a corpus would know the repeated ones.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import pydoc_data.topics
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import save

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Arrival, Engine
from llmtool.core.memory.geometry import LayerCacheSpec, uniform_group
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import VirtualClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.core.speculation.build import controller_of
from llmtool.core.speculation.draft import Draft, Proposer
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.speculation.suffix import SuffixProposer
from llmtool.sim.cost import H100_LLAMA_8B
from llmtool.sim.executor import CostModelExecutor, TokenContext

DATA = Path(os.environ.get("LLMTOOL_DATA", "../shared/data"))
CACHE = Path(os.environ.get("LLMTOOL_CACHE") or "~/.cache/llmtool").expanduser() / "speculation"
LOADS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.2)
POLICIES = ("off", "1", "3", "5", "8", "smartspec", "auto")
REQUESTS = 200
RECORDED = ("code edit", "summarise", "chat", "arithmetic")
DATASETS = (*RECORDED, "mix", "shift", "copy", "wrong")
PER_DATASET = 80
WRONG = 1 << 20  # no token of any vocabulary here


@dataclass(frozen=True, slots=True)
class Exchange:
    prompt: list[int]
    output: list[int]


# -- recording ---------------------------------------------------------------------------------------------


def prompts(dataset: str) -> list[str]:
    """What is asked, as one user message each."""
    if dataset == "code edit":
        with gzip.open(DATA / "prompts/HumanEval.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        return [
            "Rewrite this Python function with the argument names in upper case, and change nothing else:\n\n"
            f"```python\n{row['prompt']}{row['canonical_solution']}```"
            for row in rows[:PER_DATASET]
        ]
    if dataset == "arithmetic":
        lines = (DATA / "prompts/gsm8k_test.jsonl").read_text().splitlines()
        return [json.loads(line)["question"] for line in lines[:PER_DATASET]]
    if dataset == "chat":
        lines = (DATA / "prompts/mt_bench_question.jsonl").read_text().splitlines()
        return [json.loads(line)["turns"][0] for line in lines[:PER_DATASET]]
    topics = sorted(t for t in pydoc_data.topics.topics.values() if len(t) > 1500)
    return [f"Summarise the following text:\n\n{topic[:2500]}" for topic in topics[:PER_DATASET]]


def record() -> None:
    """Greedy for code and summaries, temperature 0.7 for chat and arithmetic; up to 200 tokens each."""
    from llmtool.bench.tokenizer import ModelTokenizer
    from llmtool.config import EngineConfig
    from llmtool.models.tokenizer import Tokenizer
    from llmtool.runtime.async_engine import AsyncEngine

    async def run() -> None:
        engine = await AsyncEngine.start(EngineConfig(max_num_seqs=16, max_model_len=2048))
        tokenizer = ModelTokenizer(Tokenizer.from_dir(engine.info.tokenizer_dir))

        async def ask(name: str, i: int, text: str) -> Exchange:
            prompt = list(tokenizer.encode_chat([{"role": "user", "content": text}]))
            heat = 0.7 if name in ("chat", "arithmetic") else 0.0
            params = SamplingParams(max_tokens=200, temperature=heat, seed=i)
            stream = await engine.add(f"{name}-{i}".replace(" ", "-"), prompt, params)
            return Exchange(prompt, [token async for output in stream for token in output.token_ids])

        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            for name in RECORDED:
                if trace(name).exists():
                    continue
                answers = await asyncio.gather(*(ask(name, i, t) for i, t in enumerate(prompts(name))))
                rows = [[a.prompt, a.output] for a in answers]
                trace(name).write_text(json.dumps(rows))
                mean = statistics.mean(len(a.output) for a in answers)
                sys.stderr.write(f"{name}: {len(rows)} exchanges, {mean:.0f} tokens of output\n")
        finally:
            await engine.close()

    asyncio.run(run())


def trace(dataset: str) -> Path:
    return CACHE / f"{dataset.replace(' ', '-')}.json"


def recorded(dataset: str) -> list[Exchange]:
    if not trace(dataset).exists():
        raise SystemExit(
            f"There is no trace of {dataset!r}: run `python benchmarks/speculation.py --record` first."
        )
    return [Exchange(prompt, output) for prompt, output in json.loads(trace(dataset).read_text())]


def copying(rng: random.Random) -> Exchange:
    """The law of the high-copy corner: 400 tokens of prompt, of which the output repeats 200 from a random place,
    each token replaced by another with a chance of 2 %."""
    prompt = [rng.randrange(30_000) for _ in range(400)]
    at = rng.randrange(200)
    return Exchange(
        prompt + prompt[at - 4 if at >= 4 else 0 : at],
        [t if rng.random() > 0.02 else rng.randrange(30_000) for t in prompt[at : at + 200]],
    )


def workload(dataset: str, seed: int = 0) -> list[Exchange]:
    """REQUESTS exchanges in the order in which they arrive."""
    rng = random.Random(seed)
    if dataset == "copy":
        return [copying(rng) for _ in range(REQUESTS)]
    if dataset in RECORDED:
        pool = [recorded(dataset)] * REQUESTS
    elif dataset == "shift":  # copying first, then none of it
        pool = [recorded("code edit")] * (REQUESTS // 2) + [recorded("chat")] * (REQUESTS - REQUESTS // 2)
    else:
        both = recorded("code edit"), recorded("chat")
        pool = [both[i % 2] for i in range(REQUESTS)]
    return [rng.choice(exchanges) for exchanges in pool]


# -- simulating --------------------------------------------------------------------------------------------


class AlwaysWrong:
    """Eight tokens that are never right, with matches of every length."""

    name = "wrong"

    def __init__(self, token: int = WRONG) -> None:
        self._count, self._token = 0, token

    def begin(self, seq: str, token_ids: Sequence[int], salt: str = "") -> None:
        pass

    def observe(self, seq: str, token_ids: Sequence[int]) -> None:
        pass

    def propose(self, seq: str, limit: int) -> Draft:
        self._count += 1
        return Draft((self._token,) * min(limit, 8), self.name, 2 + self._count % 20)

    def finish(self, seq: str) -> None:
        pass


def simulate(
    exchanges: Sequence[Exchange], moments: Sequence[float], policy: str, wrong: bool
) -> dict[str, float]:
    """Mean and percentiles of latency, seconds; requests per second."""
    answers = {str(i): exchange for i, exchange in enumerate(exchanges)}

    def token(context: TokenContext) -> int:
        exchange = answers[context.id]
        at = context.position - len(exchange.prompt)
        return exchange.output[at] if at < len(exchange.output) else 0

    controller = controller_of(policy)
    proposer: Proposer = AlwaysWrong() if wrong else SuffixProposer(0)
    drafts = None if controller is None else Speculator(controller, proposer)
    group = uniform_group([LayerCacheSpec(layer, 8, 128, 128, 2) for layer in range(32)], 16)
    allocator = UniformAllocator(
        group, 24_000, prefix_caching=False
    )  # 384k tokens: an H100 beside 8B weights
    config = SchedulerConfig(256, 2048, 8192, 100_000)
    clock = VirtualClock()
    engine = Engine(Scheduler(config, allocator, (), drafts), CostModelExecutor(H100_LLAMA_8B, token), clock)
    arrivals = [
        Arrival(
            at, str(i), e.prompt, SamplingParams(temperature=0, max_tokens=len(e.output), ignore_eos=True)
        )
        for i, (e, at) in enumerate(zip(exchanges, moments, strict=True))
    ]
    latencies = {
        o.request_id: o.times.finished - o.times.arrival
        for o in engine.run_trace(arrivals)
        if o.times is not None
    }
    values = sorted(latencies.values())
    spec = engine.stats.spec
    return {
        "mean": statistics.mean(values),
        "p50": values[len(values) // 2],
        "p99": values[int(0.99 * (len(values) - 1))],
        "rate": len(values) / clock.now(),
        "drafted": spec.draft_tokens if spec else 0,
        "accepted": spec.accepted_tokens if spec else 0,
        "steps": engine.stats.steps,
    }


def cell(dataset: str, load: float, policy: str, capacity: float) -> dict[str, float]:
    wrong = dataset == "wrong"
    exchanges = workload("chat" if wrong else dataset)
    rng = random.Random(7)
    moments, now = [], 0.0
    for _ in exchanges:
        now += rng.expovariate(load * capacity)
        moments.append(now)
    return simulate(exchanges, moments, policy, wrong)


def table(cells: dict[str, dict[str, float]], datasets: Sequence[str]) -> dict[str, Any]:
    """Per dataset and load: mean latency against off, of auto against the best fixed length, and the summary."""
    rows, against_best, against_off = [], [], []
    for dataset in datasets:
        for load in LOADS:
            means = {policy: cells[f"{dataset}/{load}/{policy}"]["mean"] for policy in POLICIES}
            best = min(means[p] for p in POLICIES if p not in ("auto", "smartspec"))
            rows.append(
                {
                    "dataset": dataset,
                    "load": load,
                    "off_seconds": means["off"],
                    **{f"{p} / off": means[p] / means["off"] for p in POLICIES[1:]},
                    "auto / best fixed": means["auto"] / best,
                    "smartspec / best fixed": means["smartspec"] / best,
                }
            )
            against_off.append(means["auto"] / means["off"])
            if dataset != "wrong":
                against_best.append(means["auto"] / best)
    return {
        "cells": rows,
        "auto / best fixed": {"worst": max(against_best), "median": statistics.median(against_best)},
        "auto / off": {"worst": max(against_off), "median": statistics.median(against_off)},
        "largest gain over off": max(1 / row["auto / off"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--policies", default=",".join(POLICIES), help="simulate these again")
    parser.add_argument("--fresh", action="store_true", help="forget cells that are known")
    args = parser.parse_args()
    if args.record:
        record()
        return
    datasets = args.datasets.split(",")
    path = CACHE / "cells.json"
    cells: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for dataset in datasets:
        exchanges = workload("chat" if dataset == "wrong" else dataset)
        capacity = simulate(exchanges, [0.0] * len(exchanges), "off", False)["rate"]
        for load in LOADS:
            for policy in args.policies.split(","):
                key = f"{dataset}/{load}/{policy}"
                if key not in cells or args.fresh:
                    cells[key] = cell(dataset, load, policy, capacity)
                    path.write_text(json.dumps(cells))
            off = cells[f"{dataset}/{load}/off"]["mean"]
            known = [p for p in POLICIES[1:] if f"{dataset}/{load}/{p}" in cells]
            ratios = {p: cells[f"{dataset}/{load}/{p}"]["mean"] / off for p in known}
            sys.stderr.write(
                f"{dataset} {load}: " + " ".join(f"{p} {r:.3f}" for p, r in ratios.items()) + "\n"
            )
    if all(f"{d}/{load}/{p}" in cells for d in DATASETS for load in LOADS for p in POLICIES):
        save("speculation_simulated", table(cells, DATASETS))


if __name__ == "__main__":
    main()
