"""Speculation on this machine: what one more verified token costs, and latency of auto against fixed lengths.

    python benchmarks/speculation_cpu.py --cost          # seconds of a decode step against verified tokens
    python benchmarks/speculation_cpu.py --repeats 3     # rates x kinds, interleaved; cells are kept

SmolLM2-135M-Instruct in process, bfloat16 where the CPU has it. All engines are alive, and idle but for the one
that is measured; kinds take turns within a repeat. Prompts: `copy` (repeat a text, greedy) and `chat` (MT-bench,
temperature 0.7). The interval is a paired bootstrap over repeats and requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import save

from llmtool.bench.tokenizer import ModelTokenizer
from llmtool.config import EngineConfig
from llmtool.core.request import SamplingParams
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.async_engine import AsyncEngine

DATA = Path(os.environ.get("LLMTOOL_DATA", "../shared/data"))
KINDS = ("off", "1", "3", "8", "auto")
KV = 256 * 2**20


def texts(kind: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    if kind == "chat":
        rows = (DATA / "prompts/mt_bench_question.jsonl").read_text().splitlines()
        questions = [json.loads(row)["turns"][0] for row in rows]
        return [rng.choice(questions) for _ in range(count)]
    topics = [t for t in pydoc_data.topics.topics.values() if len(t) > 1500]
    passages = []
    for _ in range(count):
        topic = rng.choice(topics)
        at = rng.randrange(len(topic) - 900)
        passages.append(f"Repeat the following text exactly, word by word:\n\n{topic[at : at + 700]}")
    return passages


async def ask(
    engine: AsyncEngine, name: str, prompt: Sequence[int], params: SamplingParams
) -> tuple[float, float]:
    """Latency and time per token after the first, seconds."""
    started = time.perf_counter()
    first, last, count = 0.0, 0.0, 0
    # A salt of its own: no prefix of an earlier repeat is cached, and no text of it is drafted from.
    stream = await engine.add(name, prompt, params, cache_salt=name)
    async for output in stream:
        if output.token_ids:
            last = time.perf_counter()
            first = first or last
            count += len(output.token_ids)
    return last - started, (last - first) / max(1, count - 1)


async def load(
    engine: AsyncEngine, name: str, prompts: Sequence[Sequence[int]], params: SamplingParams, rate: float
) -> list[tuple[float, float]]:
    """All requests, as a Poisson stream of `rate` requests/s; rate 0: one after the other."""
    if rate == 0:
        return [await ask(engine, f"{name}-{i}", p, params) for i, p in enumerate(prompts)]
    rng = random.Random(5)
    tasks = []
    for i, prompt in enumerate(prompts):
        tasks.append(asyncio.create_task(ask(engine, f"{name}-{i}", prompt, params)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def interval(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of means, and its 95 % interval. ours, theirs: [repeats, requests] of the same requests."""
    rng = np.random.default_rng(seed)
    repeats, requests = ours.shape
    ratios = []
    for _ in range(2000):
        r, q = rng.integers(0, repeats, repeats), rng.integers(0, requests, requests)
        ratios.append(ours[np.ix_(r, q)].mean() / theirs[np.ix_(r, q)].mean())
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(ours.mean() / theirs.mean()), float(low), float(high)


async def compare(args: argparse.Namespace) -> None:
    path = Path(args.cells)
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kinds = args.kinds.split(",")
    engines = {
        kind: await AsyncEngine.start(
            EngineConfig(spec=kind, kv_cache_memory_bytes=KV, max_num_seqs=16, enable_prefix_caching=False)
        )
        for kind in kinds
    }
    try:
        tokenizer = ModelTokenizer(Tokenizer.from_dir(engines[kinds[0]].info.tokenizer_dir))
        for data in args.data.split(","):
            params = SamplingParams(
                temperature=0.0 if data == "copy" else 0.7, max_tokens=args.tokens, ignore_eos=True, seed=1
            )
            for rate in map(float, args.rates.split(",")):
                for repeat in range(args.repeats):
                    for kind in kinds:
                        key = f"{data}/{rate}/{repeat}/{kind}"
                        if key in cells:
                            continue
                        asked = [[{"role": "user", "content": t}] for t in texts(data, args.requests, repeat)]
                        prompts = [tokenizer.encode_chat(messages) for messages in asked]
                        cells[key] = await load(engines[kind], key.replace("/", "-"), prompts, params, rate)
                        path.write_text(json.dumps(cells))
                        mean = statistics.mean(latency for latency, _ in cells[key])
                        sys.stderr.write(f"{key}: {mean:.3f} s\n")
    finally:
        for engine in engines.values():
            await engine.close()
    save("speculation_cpu", summary(cells, kinds))


def summary(cells: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    rows = []
    for data, rate in dict.fromkeys(tuple(key.split("/")[:2]) for key in cells):
        repeats = sorted({int(key.split("/")[2]) for key in cells if key.startswith(f"{data}/{rate}/")})
        whole = [r for r in repeats if all(f"{data}/{rate}/{r}/{k}" in cells for k in kinds)]
        if not whole:
            continue
        values = {k: np.array([cells[f"{data}/{rate}/{r}/{k}"] for r in whole]) for k in kinds}  # [R, N, 2]
        best = min((k for k in kinds if k != "auto"), key=lambda k: values[k][..., 0].mean())
        row: dict[str, Any] = {
            "prompts": data,
            "requests/s": float(rate),
            "repeats": len(whole),
            "best fixed": best,
        }
        for kind in kinds:
            row[kind] = {
                "latency_ms": 1e3 * float(values[kind][..., 0].mean()),
                "latency_p99_ms": 1e3 * float(np.percentile(values[kind][..., 0], 99)),
                "tpot_ms": 1e3 * float(values[kind][..., 1].mean()),
            }
        for name, other in (("off", "off"), ("best fixed", best)):
            row[f"auto / {name}"] = interval(values["auto"][..., 0], values[other][..., 0])
        rows.append(row)
    return {"rows": rows, "ratios": "mean latency, and the ends of a 95 % bootstrap interval"}


def cost() -> dict[str, Any]:
    """Median seconds of a decode step by batch and verified tokens a sequence; drafts are always wrong."""
    from speculation import AlwaysWrong

    from llmtool.core.engine import Engine
    from llmtool.core.ports import RealClock
    from llmtool.core.scheduler import Scheduler
    from llmtool.core.speculation.controllers import FixedController
    from llmtool.core.speculation.speculator import Speculator
    from llmtool.runtime.executor import build_engine

    config = EngineConfig(kv_cache_memory_bytes=KV, max_num_seqs=16)
    parts = build_engine(config, lambda text, done: None)
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(3):
        for batch in (1, 4, 16):
            for k in (0, 1, 2, 4, 8):
                allocator = parts.allocator(prefix_caching=False)
                wrong = AlwaysWrong(token=5)
                drafts = Speculator(FixedController(k), wrong) if k else None
                engine = Engine(
                    Scheduler(parts.scheduler, allocator, (), drafts), parts.executor, RealClock()
                )
                for i in range(batch):
                    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
                    engine.add(f"{batch}-{k}-{i}", list(range(10 + i, 138 + i)), params)
                while engine.has_work:
                    started = time.perf_counter()
                    engine.step()
                    took, step = time.perf_counter() - started, engine.last_step
                    if step and len(step.scheduled) == batch and step.num_tokens == batch * (k + 1):
                        seconds.setdefault((batch, k), []).append(took)
    rows = [
        {"batch": b, "verified": k + 1, "ms": 1e3 * statistics.median(v), "steps": len(v)}
        for (b, k), v in sorted(seconds.items())
    ]
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--data", default="copy,chat")
    parser.add_argument("--rates", default="0,0.5,1,2", help="requests/s; 0 is one after the other")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--cells", default="speculation_cpu.cells.json", help="where finished cells are kept")
    args = parser.parse_args()
    if args.cost:
        save("speculation_cpu_cost", cost())
    else:
        asyncio.run(compare(args))


if __name__ == "__main__":
    main()
