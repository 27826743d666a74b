"""Seconds per phase of a whole run, and latency of the small model against the dense one, interleaved in one run.

python benchmarks/prune/speed.py --model DIR --task sst2 --samples 512 --flops 0.5
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import save


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--batches", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    from llmtool.prune import latency
    from llmtool.prune.config import PruneConfig
    from llmtool.prune.model import find, load_model
    from llmtool.prune.pipeline import Run

    sizes = args.batches or ((1, 32, 256) if torch.cuda.is_available() else (1, 32))
    work = Path(tempfile.mkdtemp())
    try:
        config = PruneConfig(
            args.model, {"flops": args.flops}, task=args.task, samples=args.samples, output=work / "out"
        )
        start = time.monotonic()
        report = Run(config).execute()
        total = time.monotonic() - start
        dense = load_model(find(args.model), "cuda" if torch.cuda.is_available() else "cpu")
        import transformers

        small = getattr(transformers, dense.auto).from_pretrained(
            work / "out" / "model", trust_remote_code=True, dtype=torch.float32
        )
        small.eval().to(next(dense.model.parameters()).device)
        table = latency.compare(
            dense, {"dense": dense.model, "small": small}, sizes, report.latency_tokens, args.rounds
        )
    finally:
        shutil.rmtree(work)
    name = Path(args.model).name
    save(
        f"prune_speed_{name}",
        {
            "model": name, "task": args.task, "samples": args.samples, "flops": args.flops,
            "seconds": report.seconds, "total_s": round(total, 1), "tokens": report.latency_tokens,
            "latency_ms": {b: {k: round(1e3 * v, 3) for k, v in t.items()} for b, t in table.items()},
            "speedup": {b: round(t["dense"] / t["small"], 3) for b, t in table.items()},
            "metric": report.metric, "peak_memory_bytes": report.peak_memory_bytes,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
