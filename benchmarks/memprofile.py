"""What memprofile says, for models of every kind of layer, and how long it takes to say it.

All but the last part is simulated: requests replayed against each way of handing out memory, by bytes.

- compare: batch, preemptions and prefix hits of named workloads under every allocator.
- static: Ministral-8B in 9 GiB with one request of 131,072 tokens, under a partition made for 8,192.
- draft: a model with its draft in one arena, by how many requests of 32,768 tokens fit.
- vision cache: prompts of 13 image tiles in chunks, their embeddings in pages of the arena that are freed as
  chunks read them, beside no cache at all: the vision encoder runs again for every chunk.
- cold: wall time of the whole command, in a fresh process, measured.

python benchmarks/memprofile.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

from common import save

from llmtool.core.memory.geometry import LayerCacheSpec
from llmtool.core.memory.model import ModelGeometry
from llmtool.core.memory.page_plan import plan_pages
from llmtool.memprofile.demand import ALLOCATORS, demand
from llmtool.memprofile.profile import profile
from llmtool.memprofile.replay import replay
from llmtool.memprofile.requests import Ask, named
from llmtool.memprofile.setting import Setting
from llmtool.modelspec.catalogue import read_config
from llmtool.sim.catalogue import geometry_of
from llmtool.sim.ir import read_ir

GIB = 1 << 30
CASES = (
    ("llama-3.1-8b", "chat", 24),
    ("gemma-3-27b", "docqa", 80),
    ("ministral-8b", "agent", 24),
    ("gpt-oss-20b", "agent", 20),
    ("llama-4-scout", "docqa", 288),
    ("falcon-h1-1.5b", "agent", 12),
    ("jamba-1.5-mini", "summarize", 128),
    ("nemotron-h-8b", "summarize", 24),
    ("lfm2-1.2b", "chat", 8),
)
TILES, TILE_TOKENS, TEXT, CHUNK = 13, 256, 100, 1024  # InternVL2-8B: 12 tiles and a thumbnail


def setting(name: str, gib: int, max_len: int = 32768) -> Setting:
    ir = read_ir(read_config(name), name)
    return Setting(ir, gib * GIB, dtype=ir.native, max_len=min(ir.max_positions, max_len))


def compare() -> list[Mapping[str, object]]:
    rows = []
    for name, workload, gib in CASES:
        d = profile(setting(name, gib), named(workload, 512), workload, ALLOCATORS)
        row = {"model": name, "workload": workload, "card_gib": gib, "binding": d["binding"]}
        rows.append({**row, "allocators": d["allocators"], "what_ifs": d["what_ifs"]})
        print(name, workload, [(r["allocator"], round(r.get("mean_batch", 0), 1)) for r in d["allocators"]])
    return rows


def static() -> list[dict[str, object]]:
    """The published comparison has the static partition run out of memory on Ministral."""
    s, rows = setting("ministral-8b", 80, 131072), []
    for name, made_for in (("static", 8192), ("static", 131072), ("near", 8192)):
        r = replay(demand(name, s, 9 * GIB, made_for), [Ask(131_000, 72)], s.max_seqs)
        rows.append({"allocator": name, "made_for_tokens": made_for, "runs": r.never == 0})
        print(rows[-1])
    return rows


def draft() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for target, small in (
        ("gemma-3-27b", "gemma-3-4b"),
        ("gemma-2-27b", "gemma-2-9b"),
        ("llama-3.1-70b", "llama-3.2-1b"),
    ):
        both = geometry_of(target).with_draft(geometry_of(small))
        fits = {}
        for mode in ("uniform", "max", "near"):
            plan = plan_pages(both, mode=mode)  # type: ignore[arg-type]
            fits[mode] = 48 * GIB // plan.allocated_bytes(32768)
        rows.append({"target": target, "draft": small, "kv_gib": 48, "requests_of_32768_that_fit": fits})
        print(rows[-1])
    return rows


def vision_cache() -> dict[str, object]:
    """By work: multiply-accumulates of encoder and prompt, 304 M and 7.7 B parameters (InternVL2-8B)."""
    image, hidden, layers = TILES * TILE_TOKENS, 4096, 32
    chunks = -(-(image + TEXT) // CHUNK)
    encoder, prompt = 304e6 * TILES * 1025, 7.7e9 * (image + TEXT)
    again, once = prompt + chunks * encoder, prompt + encoder
    rows = [LayerCacheSpec(i, 8, 128, 128, 2) for i in range(layers)]
    embeddings = LayerCacheSpec(
        layers, 1, hidden, 0, 2, "cross_attention"
    )  # rows per image token, like its keys
    plan = plan_pages(ModelGeometry("internvl2-8b", (*rows, embeddings)))
    held = [plan.allocated_bytes(0 + 1, max(0, image - done)) for done in range(0, image + TEXT, CHUNK)]
    kv = plan.allocated_bytes(image + TEXT, 0)
    return {
        "chunks": chunks,
        "encoder_runs_without_cache": chunks,
        "encoder_runs_with_cache": 1,
        "prompt_work_saved_percent": round(100 * (1 - once / again), 1),
        "embedding_bytes_by_chunk": held,
        "embedding_peak_over_kv_percent": round(100 * held[0] / kv, 1),
    }


def cold(repeats: int) -> dict[str, float]:
    seconds = {}
    for name, workload in (("llama-3.1-8b", "chat"), ("gemma-3-27b", "docqa"), ("falcon-h1-1.5b", "agent")):
        command = [
            sys.executable,
            "-m",
            "llmtool",
            "memprofile",
            name,
            "--device",
            "h200",
            "--workload",
            workload,
        ]
        runs = []
        for _ in range(repeats):
            begin = time.perf_counter()
            subprocess.run([*command, "--json"], check=True, capture_output=True)
            runs.append(time.perf_counter() - begin)
        seconds[f"{name} {workload}"] = round(statistics.median(runs), 2)
    print(seconds)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    save(
        "memprofile",
        {
            "compare_simulated": compare(),
            "static_simulated": static(),
            "draft_simulated": draft(),
            "vision_cache_simulated": vision_cache(),
            "cold_seconds": cold(args.repeats),
            "repeats": args.repeats,
            "note": "cold measured on a machine with other work on it: noisy",
        },
    )


if __name__ == "__main__":
    main()
