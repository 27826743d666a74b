"""CPU cost of the policy core: schedule + update per running request per step. Target: <= 10 us at 256 requests.

First decoding only, then with requests that come and go (their prompts' chunks, hashing and ends included).

python benchmarks/scheduler_cost.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

from common import save

from llmtool.config import SchedulerConfig
from llmtool.core.memory.geometry import LayerCacheSpec, uniform_group
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import StepResult
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler

GROUP = uniform_group([LayerCacheSpec(i, 8, 128, 128, 2) for i in range(32)], 16)


def measure(requests: int, steps: int) -> dict[str, float]:
    """Decoding only, after all prompts are in: microseconds per request per step."""
    config = SchedulerConfig(max_num_seqs=requests, max_num_batched_tokens=8192, max_model_len=4096)
    scheduler = Scheduler(config, UniformAllocator(GROUP, requests * 64 + 256))
    for i in range(requests):
        scheduler.add(f"r{i}", [i + k for k in range(100 + i % 64)], SamplingParams(max_tokens=3000), 0.0)

    def step() -> tuple[float, float]:
        t0 = time.perf_counter()
        out = scheduler.schedule(0.0)
        t1 = time.perf_counter()
        result = StepResult(out.step_id, [[7] if entry.sample else [] for entry in out.scheduled])
        t2 = time.perf_counter()
        scheduler.update(out, result, 0.0)
        return t1 - t0, time.perf_counter() - t2

    while any(r.num_output_tokens < 2 for r in scheduler._roster.groups[f"r{requests - 1}"]):
        step()
    times = [step() for _ in range(steps)]
    scale = 1e6 / requests / steps
    schedule, update = (sum(t[i] for t in times) * scale for i in (0, 1))
    return {"schedule_us": schedule, "update_us": update, "total_us": schedule + update}


def churn(requests: int, waiting: int, seconds: float) -> dict[str, float]:
    """Requests come and go: 64-token outputs, `waiting` more in the queue; microseconds per request per step."""
    config = SchedulerConfig(requests, 8192, 4096, max_waiting=10**6)
    scheduler = Scheduler(config, UniformAllocator(GROUP, requests * 64))
    count, spent, served = 0, 0.0, 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        while count < requests + waiting + scheduler.stats.generation_tokens // 64:
            prompt = [count + k for k in range(100 + count % 64)]
            scheduler.add(f"r{count}", prompt, SamplingParams(max_tokens=64), float(count))
            count += 1
        t0 = time.perf_counter()
        out = scheduler.schedule(0.0)
        t1 = time.perf_counter()
        result = StepResult(out.step_id, [[7] if entry.sample else [] for entry in out.scheduled])
        t2 = time.perf_counter()
        scheduler.update(out, result, 0.0)
        spent += t1 - t0 + time.perf_counter() - t2
        served += len(out.scheduled)
    return {"total_us": spent * 1e6 / served}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = []
    for requests in (1, 16, 64, 256):
        runs = [measure(requests, 400) for _ in range(args.repeats)]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"requests": requests, **{k: round(v, 3) for k, v in median.items()}})
        print(rows[-1])
    busy = []
    for waiting in (0, 1024, 10_000):
        runs = [churn(256, waiting, 2.0)["total_us"] for _ in range(args.repeats)]
        busy.append({"requests": 256, "waiting": waiting, "total_us": round(statistics.median(runs), 3)})
        print(busy[-1])
    save(
        "scheduler_cost",
        {"rows": rows, "with_arrivals_and_ends": busy, "target_us_at_256": 10.0, "repeats": args.repeats},
    )


if __name__ == "__main__":
    main()
