"""Speculation on this machine: what one more verified token costs, and latency of auto against fixed lengths.

    python benchmarks/speculation_cpu.py --cost          # seconds of a decode step against verified tokens
    python benchmarks/speculation_cpu.py --minutes 25    # loads x kinds, interleaved; run it again to go on
    python benchmarks/speculation_cpu.py --report        # of the cells that are there

SmolLM2-135M-Instruct, bfloat16 where the CPU has it. All engines are alive, and idle but for the one that is
measured; kinds take turns within a load, loads within a repeat, the most telling first. Prompts: `copy` (repeat a
text, greedy) and `chat` (MT-bench, temperature 0.7), the same and at the same moments for all kinds. Loads: one
request after the other; Poisson arrivals at parts of what `off` serves when all come at once; 16 at a time. The
interval is a paired bootstrap over repeats and requests; its upper end is held to 1.07 times the best fixed length
(off among them, chosen in hindsight) and 1.05 times off.
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
LOADS = ("one", "0.9", "sixteen", "0.5", "1.2")  # 0.1 runs one at a time too, and takes minutes a cell
LIMITS = {"off": 1.05, "best fixed": 1.07}  # of the interval's upper end
SEATS = 16
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
    engine: AsyncEngine,
    name: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    rate: float = 0.0,
    at_once: int = 1,
) -> list[tuple[float, float]]:
    """All requests, as a Poisson stream of `rate` requests/s; rate 0: `at_once` at a time."""
    if rate == 0:
        seats = asyncio.Semaphore(at_once)

        async def turn(i: int, prompt: Sequence[int]) -> tuple[float, float]:
            async with seats:
                return await ask(engine, f"{name}-{i}", prompt, params)

        return list(await asyncio.gather(*(turn(i, p) for i, p in enumerate(prompts))))
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


class Cells:
    """What is measured, kept in a file after every cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, key: str, value: Any) -> None:
        self.found[key] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found))
        partial.replace(self.path)


class Comparison:
    def __init__(self, args: argparse.Namespace, engines: dict[str, AsyncEngine], cells: Cells) -> None:
        self.args, self.engines, self.cells = args, engines, cells
        some = next(iter(engines.values()))
        self.tokenizer = ModelTokenizer(Tokenizer.from_dir(some.info.tokenizer_dir))

    def prompts(self, data: str, count: int, seed: int) -> list[Sequence[int]]:
        asked = [[{"role": "user", "content": text}] for text in texts(data, count, seed)]
        return [self.tokenizer.encode_chat(messages) for messages in asked]

    def params(self, data: str, tokens: int | None = None) -> SamplingParams:
        temperature = 0.0 if data == "copy" else 0.7
        return SamplingParams(
            temperature=temperature, max_tokens=tokens or self.args.tokens, ignore_eos=True, seed=1
        )

    async def warm(self) -> None:
        """Every engine has seen both kinds of text, alone and together, before it is measured."""
        for kind, engine in self.engines.items():
            for data in self.args.data.split(","):
                for at_once in (1, 8):
                    prompts = self.prompts(data, at_once, -1)
                    await load(
                        engine, f"warm-{kind}-{data}-{at_once}", prompts, self.params(data, 48), 0.0, 8
                    )

    async def capacity(self, data: str) -> float:
        """Requests/s that `off` serves when all come at once."""
        key = f"capacity/{data}"
        if key not in self.cells.found:
            started = time.perf_counter()
            prompts = self.prompts(data, 2 * SEATS, -2)
            await load(self.engines["off"], key, prompts, self.params(data), 0.0, len(prompts))
            self.cells.keep(key, len(prompts) / (time.perf_counter() - started))
        return float(self.cells.found[key])

    async def run(self, deadline: float) -> None:
        kinds = list(self.engines)
        for repeat in range(self.args.repeats):
            for name in self.args.loads.split(","):
                for data in self.args.data.split(","):
                    for kind in kinds[repeat % len(kinds) :] + kinds[: repeat % len(kinds)]:
                        key = f"{data}/{name}/{repeat}/{kind}"
                        if key in self.cells.found:
                            continue
                        if time.monotonic() > deadline:
                            return
                        self.cells.keep(key, await self.cell(data, name, repeat, kind))
                        mean = statistics.mean(latency for latency, _ in self.cells.found[key])
                        sys.stderr.write(f"{key}: {mean:.3f} s\n")

    async def cell(self, data: str, name: str, repeat: int, kind: str) -> list[tuple[float, float]]:
        engine, params, prefix = self.engines[kind], self.params(data), f"{data}-{name}-{repeat}-{kind}"
        if name == "one":
            return await load(engine, prefix, self.prompts(data, self.args.requests, repeat), params)
        prompts = self.prompts(data, 2 * self.args.requests, repeat)
        if name == "sixteen":
            return await load(engine, prefix, prompts, params, 0.0, SEATS)
        return await load(engine, prefix, prompts, params, float(name) * await self.capacity(data))


async def compare(args: argparse.Namespace, cells: Cells) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    engines = {
        kind: await AsyncEngine.start(
            EngineConfig(spec=kind, kv_cache_memory_bytes=KV, max_num_seqs=SEATS, enable_prefix_caching=False)
        )
        for kind in args.kinds.split(",")
    }
    try:
        comparison = Comparison(args, engines, cells)
        await comparison.warm()
        await comparison.run(deadline)
    finally:
        for engine in engines.values():
            await engine.close()


def summary(cells: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Per prompts and load, of the repeats in which all kinds were measured."""
    rows = []
    for data, name in dict.fromkeys(tuple(key.split("/")[:2]) for key in cells if key.count("/") == 3):
        repeats = sorted({int(key.split("/")[2]) for key in cells if key.startswith(f"{data}/{name}/")})
        whole = [r for r in repeats if all(f"{data}/{name}/{r}/{k}" in cells for k in kinds)]
        if not whole:
            continue
        values = {k: np.array([cells[f"{data}/{name}/{r}/{k}"] for r in whole]) for k in kinds}  # [R, N, 2]
        best = min((k for k in kinds if k != "auto"), key=lambda k: values[k][..., 0].mean())
        row: dict[str, Any] = {"prompts": data, "load": name, "repeats": len(whole), "best fixed": best}
        if f"capacity/{data}" in cells and name not in ("one", "sixteen"):
            row["requests/s"] = float(name) * cells[f"capacity/{data}"]
        for kind in kinds:
            row[kind] = {
                "latency_ms": 1e3 * float(values[kind][..., 0].mean()),
                "latency_p99_ms": 1e3 * float(np.percentile(values[kind][..., 0], 99)),
                "tpot_ms": 1e3 * float(values[kind][..., 1].mean()),
            }
        for against, other in (("off", "off"), ("best fixed", best)):
            ratio, low, high = interval(values["auto"][..., 0], values[other][..., 0])
            held = high <= LIMITS[against]
            row[f"auto / {against}"] = {"ratio": ratio, "interval": [low, high], "held": held}
        rows.append(row)
    return {
        "rows": rows,
        "ratios": "mean latency, and the ends of a 95 % bootstrap interval",
        "limits": LIMITS,
    }


def table(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> str:
    lines = [
        "prompts load      repeats " + "".join(f"{kind:>9}" for kind in kinds) + "   auto/off  auto/best"
    ]
    for row in rows:
        figures = "".join(f"{row[kind]['latency_ms']:9.0f}" for kind in kinds)
        ratios = ""
        for against in ("off", "best fixed"):
            of = row[f"auto / {against}"]
            ratios += f"   {of['ratio']:.3f} [{of['interval'][0]:.3f}, {of['interval'][1]:.3f}]"
            ratios += "" if of["held"] else "!"
        lines.append(
            f"{row['prompts']:8}{row['load']:10}{row['repeats']:7} {figures}{ratios} {row['best fixed']}"
        )
    return "\n".join(lines)


def cost() -> dict[str, Any]:
    """Median seconds of a decode step by batch and verified tokens a sequence; drafts are always wrong."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch comes, as in the engine's own process
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
            for k in (0, 1, 2, 3, 4, 7, 8, 16):
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
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no cell after so many")
    parser.add_argument("--data", default="copy,chat")
    parser.add_argument("--loads", default=",".join(LOADS), help="one, sixteen, or parts of off's capacity")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10, help="twice as many where several run together")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument(
        "--cells", type=Path, default=Path("out/speculation_cpu.json"), help="where cells are kept"
    )
    args = parser.parse_args()
    if args.cost:
        save("speculation_cpu_cost", cost())
        return
    args.cells.parent.mkdir(parents=True, exist_ok=True)
    cells = Cells(args.cells)
    if not args.report:
        asyncio.run(compare(args, cells))
    kinds = args.kinds.split(",")
    found = summary(cells.found, kinds)
    print(table(found["rows"], kinds))
    save("speculation_cpu", found)


if __name__ == "__main__":
    main()
