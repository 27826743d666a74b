"""What the machine gives at this moment: fixed memory and matrix work, timed before each contender.

A machine shared with others gives now more, now less. The figures stand beside every result, so that a difference
that is the machine's is seen as one. Run as a module, it prints one JSON line; a process of its own, so that the
harness never holds torch's threads.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

READ_BYTES = 256 * 2**20
SHAPE = (512, 576, 1536)  # tokens, in, out: an MLP matrix of the model at a full step
REPEATS = 15


def measure() -> dict[str, float]:
    """read_gb_s: memory read by all cores. gemm_gflop_s: bfloat16 matrix product. Medians."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    block = torch.zeros(READ_BYTES // 4, dtype=torch.int32)
    tokens, inner, outer = SHAPE
    a = torch.ones(tokens, inner, dtype=torch.bfloat16)
    b = torch.ones(outer, inner, dtype=torch.bfloat16)

    def median(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    with torch.inference_mode():
        read = median(block.max)
        gemm = median(lambda: torch.nn.functional.linear(a, b))
    return {
        "read_gb_s": round(READ_BYTES / read / 1e9, 2),
        "gemm_gflop_s": round(2 * tokens * inner * outer / gemm / 1e9, 1),
    }


def machine_probe() -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.probe"], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(measure()))
