"""How many streams can the bench client follow before it is the bottleneck itself?

    python benchmarks/bench_client.py [--streams 50 100 200 400] [--itl 0.02] [--out
    benchmarks/results/bench_client.json]

A mock server in a second process sends a chunk every `--itl` seconds on each stream. What the client measures is
compared with what the mock was told to do; its CPU share and event-loop lag are its own evidence. The mock shares
the machine, so on two cores its delays are in the measured gaps too: the figures are upper bounds of the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig
from llmtool.bench.environment import hardware, versions
from llmtool.bench.run import connect, run_bench, run_blocking


class ByteTokenizer:
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")


async def measure(url: str, streams: int, chunks: int, itl: float) -> dict[str, object]:
    data = DatasetConfig(num_prompts=streams, random_input_len=128, random_output_len=chunks)
    config = BenchConfig(url=url, dataset=data, load=LoadConfig(max_concurrency=streams, num_warmups=streams))
    config, backend = await connect(config)
    async with backend:
        result = await run_bench(config, backend, ByteTokenizer())
    run = result.runs[0]
    m, client = run.metrics, run.client
    return {
        "streams": streams,
        "chunks_per_second": round(m["output_throughput"], 1),
        "failed": m["failed"],
        "itl_told_ms": itl * 1000,
        "itl_mean_ms": round(m["mean_itl_ms"], 3),
        "itl_p99_ms": round(m["p99_itl_ms"], 3),
        "client_cpu_share": round(client["cpu_share"], 3),
        "client_cpu_us_per_chunk": round(
            client["cpu_share"] * m["duration"] * 1e6 / m["total_output_tokens"], 1
        ),
        "client_loop_lag_p99_ms": round(client["loop_lag_p99_ms"], 3),
        "client_is_bottleneck": client["is_bottleneck"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one run")
    parser.add_argument("--itl", type=float, default=0.02, help="seconds between the mock's chunks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--asyncio", action="store_true", help="asyncio's own loop instead of uvloop")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load_before = round(os.getloadavg()[0], 2)  # of others: above 0 the lags are not the client's alone
    runner = asyncio.run if args.asyncio else run_blocking
    command = [sys.executable, "-m", "llmtool.bench.mock", "--ttft", "0.1", "--itl", str(args.itl)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        rows = []
        for streams in args.streams:
            chunks = max(2, round(args.seconds / args.itl))
            runs = [runner(measure(url, streams, chunks, args.itl)) for _ in range(args.repeats)]
            # The median run by CPU cost: the others show the machine's other tenants.
            runs.sort(key=lambda run: run["client_cpu_us_per_chunk"])
            rows.append(runs[len(runs) // 2])
            print(json.dumps(rows[-1]))
    finally:
        server.terminate()
        server.wait()
    cost = statistics.median(row["client_cpu_us_per_chunk"] for row in rows)
    report = {
        "benchmark": "bench_client",
        "event_loop": "asyncio" if args.asyncio else "uvloop",
        "repeats": args.repeats,
        "load_average_before": load_before,
        "client_cpu_us_per_chunk_median": cost,
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["hardware"]))


if __name__ == "__main__":
    main()
