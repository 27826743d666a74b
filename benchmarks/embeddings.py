"""Embeddings of the same texts by llmtool and by sentence-transformers, one after the other, several times.

    python benchmarks/embeddings.py [--texts 256] [--threads 2] [--repeats 7] [--save]

The model is the embedded MiniLM-L6. The peer runs as its users run it, `SentenceTransformer(...).encode(texts)`,
in float32 (its default) and in bfloat16, in a process of its own; llmtool runs with its engine in a process of its
own, tokenizing included on both sides, once through the engine and once over HTTP, one request for all texts. Only
one of them works at a time. Beside the wall time stands the CPU time of all processes of a side, which other
tenants of the machine disturb less. Install the peer first: pip install sentence-transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import pydoc_data.topics
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from common import save

from llmtool.config import EngineConfig, ServerConfig
from llmtool.models.resolve import embedded
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.async_engine import AsyncEngine
from llmtool.serve.server import bind, serve

Result = tuple[float, float, np.ndarray]  # wall seconds, CPU seconds, vectors
Run = Callable[[list[str]], Awaitable[Result]]


MAX_TOKENS = 256  # where sentence-transformers cuts this model's texts, and llmtool refuses them


def make_texts(count: int, seed: int) -> list[str]:
    """Passages of English whose lengths spread as sentences' and paragraphs' do: 20 words in the middle."""
    rng, tokenizer = random.Random(seed), Tokenizer.from_dir(embedded("minilm"))
    words = " ".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)).split()
    texts: list[str] = []
    while len(texts) < count:
        length = min(150, max(3, round(rng.lognormvariate(3.0, 0.8))))
        start = rng.randrange(len(words) - length)
        text = " ".join(words[start : start + length])
        if len(tokenizer.encode(text)) <= MAX_TOKENS:
            texts.append(text)
    return texts


def peer(connection: Connection, directory: str, dtype: str, threads: int) -> None:
    """The peer's process: texts in, (wall, CPU, vectors) out, None ends it."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(directory, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    connection.send("ready")
    while (texts := connection.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        vectors = model.encode(texts, show_progress_bar=False)
        connection.send((time.perf_counter() - wall, time.process_time() - cpu, np.asarray(vectors)))


class Peer:
    def __init__(self, dtype: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, str(embedded("minilm")), dtype, threads)
        self._process = context.Process(target=peer, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        assert self._connection.recv() == "ready"

    async def __call__(self, texts: list[str]) -> Result:
        self._connection.send(texts)
        result: Result = self._connection.recv()
        return result

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Ours:
    """Through the engine: what one HTTP request does, without HTTP."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._tokenizer = Tokenizer.from_dir(engine.info.tokenizer_dir)
        self._count = 0

    def cpu(self) -> float:
        return time.process_time() + cpu_seconds(self._engine.info.pid)

    async def __call__(self, texts: list[str]) -> Result:
        wall, cpu = time.perf_counter(), self.cpu()
        self._count += 1
        stream = await self._engine.pool(f"run-{self._count}", self._tokenizer.encode_batch(texts))
        vectors = {out.index: np.frombuffer(out.vector, np.float32) async for out in stream}
        rows = np.stack([vectors[i] for i in range(len(texts))])
        return time.perf_counter() - wall, self.cpu() - cpu, rows


class OverHttp:
    """The same engine behind the server, which shares this process with its client."""

    def __init__(self, ours: Ours, session: aiohttp.ClientSession, url: str) -> None:
        self._ours, self._session, self._url = ours, session, url

    async def __call__(self, texts: list[str]) -> Result:
        wall, cpu = time.perf_counter(), self._ours.cpu()
        body = {"input": texts, "encoding_format": "base64"}
        async with self._session.post(f"{self._url}/v1/embeddings", json=body) as response:
            answer = await response.json()
        rows = np.stack([np.frombuffer(base64.b64decode(r["embedding"]), "<f4") for r in answer["data"]])
        return time.perf_counter() - wall, self._ours.cpu() - cpu, rows


async def measure(texts: list[str], threads: int, repeats: int) -> dict[str, Any]:
    peers = {f"sentence-transformers {dtype}": Peer(dtype, threads) for dtype in ("float32", "bfloat16")}
    engines = {
        dtype: await AsyncEngine.start(EngineConfig("minilm", dtype=dtype, num_threads=threads))
        for dtype in ("float32", "bfloat16")
    }
    runs: dict[str, Run] = dict(peers)
    ours = {dtype: Ours(engine) for dtype, engine in engines.items()}
    runs |= {f"llmtool {dtype}": run for dtype, run in ours.items()}
    listener, stop, ready = bind("127.0.0.1", 0), asyncio.Event(), asyncio.Event()
    tokenizer = Tokenizer.from_dir(engines["bfloat16"].info.tokenizer_dir)
    server = asyncio.create_task(
        serve(
            engines["bfloat16"],
            tokenizer,
            ServerConfig(),
            listener,
            on_listening=lambda host, port: ready.set(),
            handle_signals=False,
            stop=stop,
        )
    )
    await ready.wait()
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        runs["llmtool bfloat16 over HTTP"] = OverHttp(ours["bfloat16"], session, url)
        seen: dict[str, list[Result]] = {name: [] for name in runs}
        for repeat in range(repeats + 1):
            names = list(runs) if repeat % 2 else list(reversed(runs))
            for name in names:
                result = await runs[name](texts)
                if repeat:  # the first warms up
                    seen[name].append(result)
                sys.stderr.write(f"{name}: {result[0]:.2f} s, {result[1]:.2f} s of CPU\n")
    stop.set()
    await server
    for engine in engines.values():
        await engine.close()
    for process in peers.values():
        process.close()
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return {"tokens": tokens, **report(seen, texts, tokens)}


def report(seen: dict[str, list[Result]], texts: list[str], tokens: int) -> dict[str, Any]:
    exact = seen["sentence-transformers float32"][0][2]
    rows = {}
    for name, results in seen.items():
        wall, cpu = (statistics.median(r[i] for r in results) for i in (0, 1))
        rows[name] = {
            "texts_per_second": len(texts) / wall,
            "tokens_per_second": tokens / wall,
            "seconds": [round(r[0], 4) for r in results],
            "cpu_seconds": [round(r[1], 4) for r in results],
            "cpu_ms_per_text": 1000 * cpu / len(texts),
            "lowest_cosine": float((results[0][2] * exact).sum(1).min()),
        }
    ratios = {}
    for mine in (name for name in rows if name.startswith("llmtool")):
        for other in (name for name in rows if not name.startswith("llmtool")):
            pairs = list(zip(seen[mine], seen[other], strict=True))
            ratios[f"{mine} / {other}"] = {
                "throughput": statistics.median(b[0] / a[0] for a, b in pairs),
                "throughput_per_cpu_second": statistics.median(b[1] / a[1] for a, b in pairs),
            }
    return {"results": rows, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/embeddings.json")
    args = parser.parse_args()
    load = os.getloadavg()[0]  # of others: above 0 the times are not this script's alone
    texts = make_texts(args.texts, args.seed)
    data = {
        "benchmark": "embeddings",
        "texts": args.texts,
        "threads": args.threads,
        "repeats": args.repeats,
        "seed": args.seed,
        "load_average_before": round(load, 2),
        **asyncio.run(measure(texts, args.threads, args.repeats)),
    }
    print(json.dumps({"results": data["results"], "ratios": data["ratios"]}, indent=1))
    if args.save:
        from importlib.metadata import version

        save("embeddings", {**data, "sentence-transformers": version("sentence-transformers")})


if __name__ == "__main__":
    main()
