"""How long a search takes, and the same question asked of AIConfigurator in the same run.

python benchmarks/plan/speed.py [--repeats 3] [--aiconfigurator VENV/bin/aiconfigurator]

Whole commands, from start to table: interpreter, imports, search, simulations. Rounds are interleaved; medians
count. --aiconfigurator: its command (PyPI, in an environment of its own); both then plan Llama-3.1-70B in fp8 on
8 H200 for requests of 1,024 + 256 tokens within TTFT 1,000 ms and TPOT 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import save

CASES: dict[str, list[str]] = {
    "8 x H100, Llama-70B, 500 requests": [
        "llama-3.1-70b", "--device", "h100", "--num-devices", "8", "--workload", "chat", "--request-rate", "8",
        "--max-num-batched-tokens", "2048", "--max-num-batched-tokens", "4096", "--max-num-batched-tokens", "8192",
        "--max-num-seqs", "64", "--max-num-seqs", "128", "--max-num-seqs", "256",
    ],
    "64 x H100, Llama-70B, 1,000 requests": [
        "llama-3.1-70b", "--device", "h100", "--num-devices", "64", "--workload", "chat", "--request-rate", "64",
        "--num-prompts", "1000",
    ],
    "64 x H100, DeepSeek-V3, 1,000 requests": [
        "deepseek-v3", "--device", "h100", "--num-devices", "64", "--workload", "chat", "--request-rate", "64",
        "--num-prompts", "1000",
    ],
    "64 x H200, Kimi-K2 (1.03 T), 1,000 requests": [
        "kimi-k2", "--device", "h200", "--num-devices", "64", "--workload", "chat", "--request-rate", "64",
        "--num-prompts", "1000",
    ],
}  # fmt: skip
SAME = ["llama-3.1-70b", "--device", "h200", "--num-devices", "8",
        "--input-len", "1024", "--output-len", "256", "--max-concurrency", "64", "--num-prompts", "512",
        "--slo", "ttft:p50:1000", "--slo", "tpot:p50:20", "--objective", "throughput"]  # fmt: skip


OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}  # neither waits for a hub


def timed(arguments: list[str]) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Wall seconds, CPU seconds of the command and its children, and what it said."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, env=OFFLINE)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done


def ours(arguments: list[str]) -> tuple[float, float, dict[str, Any]]:
    wall, cpu, done = timed([sys.executable, "-m", "llmtool", "plan", *arguments, "--json", "-q"])
    if done.returncode not in (0, 4):
        raise SystemExit(done.stderr)
    return wall, cpu, json.loads(done.stdout)


def theirs(command: str) -> tuple[float, float, str]:
    question = ["--model-path", "meta-llama/Meta-Llama-3.1-70B", "--system", "h200_sxm", "--total-gpus", "8"]
    question += ["--backend", "vllm", "--isl", "1024", "--osl", "256", "--ttft", "1000", "--tpot", "20"]
    wall, cpu, done = timed([command, "cli", "default", *question])
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return wall, cpu, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--aiconfigurator", default=None)
    parser.add_argument("--case", default="", help="only the cases that match")
    args = parser.parse_args()
    times: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    text = ""
    cases = {k: v for k, v in CASES.items() if re.search(args.case, k)}
    for _ in range(args.repeats):
        for name, arguments in cases.items():
            wall, cpu, document = ours(arguments)
            times.setdefault(name, []).append(wall)
            cpus.setdefault(name, []).append(cpu)
            found[name] = {"counts": document["counts"], "best": document["plans"][0]["plan"]}
        if args.aiconfigurator:
            wall, cpu, document = ours(SAME)
            times.setdefault("side by side, llmtool", []).append(wall)
            cpus.setdefault("side by side, llmtool", []).append(cpu)
            keys = ("plan", "max_num_batched_tokens", "max_num_seqs", "output_tokens_per_s_per_device",
                    "mean_ttft_ms", "mean_tpot_ms")  # fmt: skip
            found["side by side, llmtool"] = {
                "counts": document["counts"], "best": {k: document["plans"][0][k] for k in keys}
            }  # fmt: skip
            wall, cpu, text = theirs(args.aiconfigurator)
            times.setdefault("side by side, aiconfigurator", []).append(wall)
            cpus.setdefault("side by side, aiconfigurator", []).append(cpu)
    report: dict[str, Any] = {
        name: {
            "median_s": round(statistics.median(t), 2),
            "median_cpu_s": round(statistics.median(cpus[name]), 2),
            "all_s": [round(x, 2) for x in t],
            **found.get(name, {}),
        }
        for name, t in times.items()
    }
    if args.aiconfigurator:
        report["ratio_aiconfigurator_over_llmtool"] = round(
            statistics.median(times["side by side, aiconfigurator"])
            / statistics.median(times["side by side, llmtool"]),
            2,
        )
        report["aiconfigurator_says"] = [
            line.strip()
            for line in text.splitlines()
            if re.match(r"\s*(\|\s+\d|- Best|Best Experiment)", line)
        ]
    print(json.dumps(report, indent=1))
    save("speed", report)


if __name__ == "__main__":
    main()
