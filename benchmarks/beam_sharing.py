"""Beam search on a real model: how many KV pages sharing saves, counted while it runs.

python benchmarks/beam_sharing.py [--requests 24]

SmolLM2-135M-Instruct, instruction prompts (the first turns of MT-bench) and chat-like ones (longer prompts of
GSM8K solutions strung together), 64 output tokens, widths 2, 4 and 6. What is counted is memory, not time. The
paper's figures for OPT-13B: 37.6 to 55.2 % (Alpaca), 44.3 to 66.3 % (ShareGPT).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from common import save

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import RealClock
from llmtool.core.request import BeamParams, SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.executor import build_engine

DATA = Path(os.environ.get("LLMTOOL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def prompts(tokenizer: Tokenizer, count: int) -> dict[str, list[list[int]]]:
    with (DATA / "prompts" / "mt_bench_question.jsonl").open() as file:
        questions = [json.loads(line)["turns"][0] for line in file][:count]
    with (DATA / "prompts" / "gsm8k_test.jsonl").open() as file:
        solved = [json.loads(line) for line in file][: 3 * count]
    stories = [
        " ".join(s["question"] + " " + s["answer"] for s in solved[i * 3 : i * 3 + 2]) for i in range(count)
    ]

    def chat(texts: list[str]) -> list[list[int]]:
        return [
            list(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": t}], add_generation_prompt=True
                ).token_ids
            )
            for t in texts
        ]

    return {"instruction": chat(questions), "chat": chat(stories)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=24)
    args = parser.parse_args()
    config = EngineConfig(kv_cache_memory_bytes=2**30, max_num_seqs=64)
    parts = build_engine(config, lambda text, fraction: None)
    tokenizer = Tokenizer.from_dir(parts.info.tokenizer_dir)
    rows = []
    for name, asked in prompts(tokenizer, args.requests).items():
        for width in (2, 4, 6):
            memory = UniformAllocator(
                parts.pages, parts.num_pages, prefix_caching=False
            )  # beams share, not requests
            scheduler = Scheduler(parts.scheduler, memory, parts.info.eos_token_ids)
            engine = Engine(scheduler, parts.executor, RealClock())
            params = SamplingParams(max_tokens=64, temperature=0.0, beam=BeamParams(width), ignore_eos=True)
            for i, prompt in enumerate(asked):
                engine.add(f"{name}{width}-{i}", prompt, params)
            saved = []
            while engine.has_work:
                engine.step()
                if engine.scheduler.stats.steps % 4 == 0 and engine.has_work:
                    saved.append(memory.sharing())
            mean_prompt = statistics.mean(map(len, asked))
            row = {"workload": name, "width": width, "mean_prompt": round(mean_prompt, 1)}
            rows.append(row | {"saved": round(statistics.mean(saved), 4)})
            print(rows[-1])
    save(
        "beam_sharing", {"model": parts.info.model, "requests": args.requests, "output_len": 64, "rows": rows}
    )


if __name__ == "__main__":
    main()
