"""End-to-end decoding on a GPU: models of 1B and 8B shape with random weights, against transformers.

python benchmarks/gpu/decode.py [--dry-run] [--seconds 300]

Greedy, bfloat16, equal prompts. Ours twice: the decoder alone with its step captured in a CUDA graph, and the whole
engine (scheduler, pages, sampler), which runs its steps uncaptured. Theirs: `generate` and `generate_batch`
(continuous batching). A step's time is that of a long run less a short one, so that prompts do not count; the
floor is what reading the weights and the mean KV takes at the copy bandwidth measured in this run.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmtool_kernels.attention import AttentionBatch
from measure import RESULTS, Budget, attempt, captured, copy_bandwidth, reason, save, synchronized, table

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.geometry import uniform_group
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import RealClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.models.decoder import KVContext, NativeDecoder
from llmtool.models.weights import allocate, fill_random
from llmtool.modelspec import ModelSpec
from llmtool.runtime.aot.steps import Capture
from llmtool.runtime.executor import TorchExecutor
from llmtool.runtime.kv_store import KVStore

Run = Callable[[int], object]  # gives so many new tokens to every sequence, prompts included
TOKENS_PER_PAGE = 16
REPEATS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    },
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}


@dataclass(frozen=True, slots=True)
class Load:
    """batch prompts of so many tokens; `short` and `long` runs give so many new tokens each."""

    batch: int
    prompt: int
    short: int
    long: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        rng = random.Random(0)
        return [[rng.randrange(vocab_size) for _ in range(self.prompt)] for _ in range(self.batch)]


def per_step(run: Run, load: Load, device: torch.device) -> float:
    """Seconds of a decoding step."""
    times = []
    for n in (load.short, load.long):
        started = synchronized(device)
        run(n)
        times.append(synchronized(device) - started)
    return (times[1] - times[0]) / (load.long - load.short)


def side_by_side(
    runs: dict[str, Callable[[], Run]], load: Load, device: torch.device, budget: Budget, about: str
) -> dict[str, float | str | None]:
    """Milliseconds of a step of each, the median of REPEATS turns; or why there is no figure."""
    figures: dict[str, float | str | None] = dict.fromkeys(runs)
    ready: dict[str, tuple[Run, float]] = {}
    for what, make in runs.items():
        if not budget.allows(f"{what}, {about}", 20):
            continue
        started = synchronized(device)
        try:
            run = make()
            run(2)  # compiles, captures, allocates
        except Exception as e:
            figures[what] = reason(e)
            continue
        ready[what] = (run, synchronized(device) - started)
    times: dict[str, list[float]] = {what: [] for what in ready}
    for _ in range(REPEATS):
        for what, (run, warmup) in ready.items():
            if not isinstance(figures[what], str) and budget.allows(f"a turn of {what}, {about}", 3 * warmup):
                seconds = attempt(lambda run=run: per_step(run, load, device))
                if isinstance(seconds, str):
                    figures[what] = seconds
                else:
                    times[what].append(1e3 * seconds)
                    figures[what] = statistics.median(times[what])
    return figures


class GraphDecoder:
    """Our decoder over pages; a decoding step is captured once, and replayed with its work list refreshed."""

    def __init__(self, model: NativeDecoder, load: Load) -> None:
        self.model, self.load, self.device = model, load, model.device
        group = uniform_group(model.spec.layer_cache_specs(model.dtype.itemsize), TOKENS_PER_PAGE)
        pages = group.pages(load.prompt + load.long + 2)
        self.store = KVStore(group, pages * load.batch, device=self.device)
        order = random.Random(0).sample(range(pages * load.batch), pages * load.batch)
        self.tables = [[order.pop() * group.page_units for _ in range(pages)] for _ in range(load.batch)]
        self.lengths = [0] * load.batch
        self._step: Callable[[], object] | None = None
        self._work: list[Any] = []  # what a captured step reads its work from

    def run(self, new_tokens: int) -> torch.Tensor:
        """The last tokens [B] after prompts and so many new tokens."""
        with torch.inference_mode():
            if self._step is None:
                self._prepare()
            self.ids.copy_(self._prompts())
            self.lengths = [self.load.prompt] * self.load.batch
            self.positions.fill_(self.load.prompt)
            for _ in range(new_tokens - 1):
                self.lengths = [n + 1 for n in self.lengths]
                self.batch.kv_lens = self.lengths
                for work in self._work:
                    work.refresh(self.batch.query_lens, self.lengths)
                assert self._step is not None
                self._step()
            return self.ids

    def _prompts(self) -> torch.Tensor:
        """Run all prompts, a chunk of one sequence at a time; their first new tokens [B]."""
        ids = []
        for prompt, pages in zip(self.load.prompts(self.model.spec.vocab_size), self.tables, strict=True):
            n = len(prompt)
            batch = AttentionBatch.build([n], [n], [pages], TOKENS_PER_PAGE, self.device)
            positions = torch.arange(n, device=self.device)
            hidden = self.model.forward(
                torch.tensor(prompt, device=self.device), positions, self._context(batch)
            )
            ids.append(self.model.logits(hidden[-1:]).argmax(-1))
        return torch.cat(ids)

    def _prepare(self) -> None:
        """Buffers that every step reads and writes, and its graph."""
        load, device = self.load, self.device
        first = [load.prompt + 1] * load.batch
        self.batch = AttentionBatch.build([1] * load.batch, first, self.tables, TOKENS_PER_PAGE, device)
        self.ids = torch.zeros(load.batch, dtype=torch.int64, device=device)
        self.positions = torch.full((load.batch,), load.prompt, device=device)
        if device.type != "cuda":

            def step() -> None:
                self.batch._plans.clear()  # the torch path plans anew, and reads lengths from the host
                self._forward()

            self._step = step
            return
        self._step = captured(self._forward).replay
        self._work = [work for works in self.batch._plans.values() for work in works]

    def _forward(self) -> None:
        page = self.positions // TOKENS_PER_PAGE
        self.batch.token_units.copy_(self.batch.block_tables.gather(1, page[:, None])[:, 0])
        self.batch.token_slots.copy_(self.positions - page * TOKENS_PER_PAGE)
        hidden = self.model.forward(self.ids, self.positions, self._context(self.batch))
        self.ids.copy_(self.model.logits(hidden).argmax(-1))
        self.positions += 1

    def _context(self, batch: AttentionBatch) -> KVContext:
        layers = {i: (layout, 0) for i, layout in self.store.layouts().items()}
        return KVContext(self.store.arena, layers, (batch,))


def engine_run(model: NativeDecoder, load: Load, capture: Capture | None = None) -> Run:
    """Our whole engine, offline: all requests at once. capture: of its steps ahead of time, kept between runs."""
    group = uniform_group(model.spec.layer_cache_specs(model.dtype.itemsize), TOKENS_PER_PAGE)
    length = load.prompt + load.long + 2
    store = KVStore(group, group.pages(length) * load.batch + 1, device=model.device)
    prompts = load.prompts(model.spec.vocab_size)
    executor = TorchExecutor(model, store, load.batch, length, [], capture=capture)

    def run(new_tokens: int) -> None:
        scheduler = Scheduler(
            SchedulerConfig(load.batch, 8192, length),
            UniformAllocator(group, store.num_pages, prefix_caching=False),
        )
        engine = Engine(scheduler, executor, RealClock())
        for i, prompt in enumerate(prompts):
            engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True))
        while engine.has_work:
            engine.step()

    return run


class Peer:
    """transformers' Llama of the same shape."""

    def __init__(self, shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device = device
        config = LlamaConfig(
            **shape, **{k: v for k, v in COMMON.items() if k not in ("architectures", "model_type")}
        )
        config.dtype = dtype
        torch.set_default_dtype(dtype)
        try:
            with device:
                self.model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self.vocab_size = config.vocab_size

    def generate(self, load: Load) -> Run:
        ids = torch.tensor(load.prompts(self.vocab_size), device=self.device)

        def run(n: int) -> object:
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=n, max_new_tokens=n,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

        return run

    def continuous(self, load: Load) -> Run:
        from transformers import GenerationConfig

        prompts = load.prompts(self.vocab_size)

        def run(n: int) -> object:
            options = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0)
            out = self.model.generate_batch(prompts, generation_config=options, **self._cache_options())
            lengths = {len(answer.generated_tokens) for answer in out.values()}
            if lengths != {n} or len(out) != load.batch:
                raise RuntimeError(f"{len(out)} answers of {sorted(lengths)} tokens, not {load.batch} of {n}")
            return out

        return run

    def _cache_options(self) -> dict[str, object]:
        """On a GPU transformers sizes its cache itself; of a CPU it takes most of the memory."""
        if self.device.type == "cuda":
            return {}
        from transformers import ContinuousBatchingConfig

        return {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)}


def measure(
    name: str, loads: list[Load], device: torch.device, copy: float, budget: Budget
) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = ModelSpec.from_config({**COMMON, **SHAPES[name]})
    weights = allocate(spec, dtype, device)
    fill_random(weights, 0)
    model = NativeDecoder(spec, weights)
    peer = Peer(SHAPES[name], device, dtype)
    kv = sum(s.bytes_per_token for s in spec.layer_cache_specs(dtype.itemsize))
    weight_bytes = spec.num_parameters * dtype.itemsize
    rows = []
    for load in loads:
        runs: dict[str, Callable[[], Run]] = {
            "graph_ms": lambda load=load: GraphDecoder(model, load).run,
            "engine_ms": lambda load=load: engine_run(model, load),
            "generate_ms": lambda load=load: peer.generate(load),
            "continuous_ms": lambda load=load: peer.continuous(load),
        }
        mean_length = load.prompt + (load.short + load.long) / 2
        row: dict[str, Any] = {
            "model": name,
            "batch": load.batch,
            "prompt": load.prompt,
            "floor_ms": 1e3 * (weight_bytes + load.batch * mean_length * kv) / copy,
        }
        rows.append(row | side_by_side(runs, load, device, budget, f"{name} x {load.batch}"))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main(dry_run: bool, budget: Budget, directory: Path) -> list[dict[str, Any]]:
    device = torch.device("cpu" if dry_run else "cuda")
    copy = copy_bandwidth(device, 2**16 if dry_run else 2**31)
    if dry_run:
        rows = measure("tiny", [Load(2, 20, 3, 5)], device, copy, budget)
    else:
        rows = measure("1B", [Load(b, 1024, 16, 80) for b in (1, 8, 32, 128)], device, copy, budget)
        rows += measure("8B", [Load(b, 1024, 16, 80) for b in (1, 8, 32)], device, copy, budget)
    table("decoding, ms a step", rows)
    data = {"copy_bytes_per_s": copy, "rows": rows, "left_out": budget.left_out, "dry_run": dry_run}
    save("decode", data, directory)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: that all of it runs")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    main(args.dry_run, Budget(args.seconds), args.out)
