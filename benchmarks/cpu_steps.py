"""Where a step's time goes on a CPU, part by part, and how far each part is from its own limit.

    python benchmarks/cpu_steps.py [--repeats 9] [--threads 2] [--save]

Each kind of step of the embedded SmolLM2 runs through the whole executor: schedule, prepare, model, logits, sample,
update. The model's operations are then run one call each, to split its time; what is left over between their sum
and the whole forward is threads meeting and calls. Limits, from the same run: memory read as a product streams
it (weights, keys and values), and multiply-adds at the rate of a product that stays in the caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save
from llmtool_kernels.cpu import abi
from llmtool_kernels.cpu.linear import PackedLinear
from llmtool_kernels.cpu.native import Native, kernels
from llmtool_kernels.cpu.program import Program, StepState
from llmtool_kernels.cpu.weights import pack

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.ports import RealClock
from llmtool.core.request import SamplingParams
from llmtool.core.scheduler import Scheduler
from llmtool.models.cpu_decoder import CpuDecoder
from llmtool.models.decoder import KVContext
from llmtool.runtime.executor import TorchExecutor, build_engine

PARTS = {
    abi.EMBED: "embedding",
    abi.RMS_NORM: "norms",
    abi.LINEAR: "linears",
    abi.QKV_POST: "rotation and KV write",
    abi.ATTENTION: "attention",
}
STEPS = {  # sequences, context, new tokens each
    "decode, 1 sequence at 512": (1, 512, 1),
    "decode, 16 sequences at 400": (16, 400, 1),
    "decode, 64 sequences at 400": (64, 400, 1),
    "verify, 1 sequence at 512, 4 drafts": (1, 512, 5),
    "prompt of 512": (1, 512, 512),
}


def best(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def limits(native: Native, repeats: int) -> dict[str, float]:
    """bytes_per_second: one row by a large matrix. flops: many rows by a matrix that stays in the caches."""
    large = PackedLinear(pack(torch.randn(65536, 1024).bfloat16(), native), native)
    row = torch.randn(1, 1024).bfloat16()
    read = large.nbytes / best(lambda: large(row), repeats)
    small = PackedLinear(pack(torch.randn(1024, 256).bfloat16(), native), native)
    rows = torch.randn(384, 256).bfloat16()
    product = best(lambda: small(rows, torch.float32), 5 * repeats)
    return {"bytes_per_second": read, "flops": 2 * 384 * 1024 * 256 / product}


class Bench:
    def __init__(self, quantization: str | None, threads: int) -> None:
        config = EngineConfig(num_threads=threads, quantization=quantization, kv_cache_memory_bytes=2**30)
        parts = build_engine(config, lambda text, fraction: None)
        assert isinstance(parts.executor, TorchExecutor) and isinstance(parts.executor.model, CpuDecoder)
        self.parts, self.executor, self.model = parts, parts.executor, parts.executor.model

    def step(self, sequences: int, context: int, new: int, repeats: int) -> dict[str, float]:
        """Milliseconds of one step, by part: medians."""
        rows = [self._once(sequences, context, new) for _ in range(repeats)]
        return {key: 1e3 * statistics.median(row[key] for row in rows) for key in rows[0]}

    def _once(self, sequences: int, context: int, new: int) -> dict[str, float]:
        parts = self.parts
        allocator = parts.allocator(False)
        scheduler = Scheduler(parts.scheduler, allocator, parts.info.eos_token_ids)
        engine = Engine(scheduler, self.executor, RealClock())
        # A prompt as long as all but the last step's tokens; the step looked at then adds `new`.
        params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        for i in range(sequences):
            engine.add(f"r{i}", [(7 * i + k) % 40000 + 100 for k in range(context)], params)
        whole_prompt = new == context
        while not whole_prompt and any(r.num_output_tokens == 0 for r in self._requests(scheduler)):
            engine.step()
        timed = {"model": 0.0, "logits": 0.0, "submit": 0.0}
        calls: list[tuple[Any, ...]] = []
        forward, logits, submit = self.model.forward, self.model.logits, self.executor.submit

        def clocked(name: str, call: Callable[..., Any], keep: bool = False) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                if keep:
                    calls.append(args)
                started = time.perf_counter()
                result = call(*args)
                timed[name] += time.perf_counter() - started
                return result

            return run

        self.model.forward = clocked("model", forward, True)  # type: ignore[method-assign]
        self.model.logits = clocked("logits", logits)  # type: ignore[method-assign]
        self.executor.submit = clocked("submit", submit)  # type: ignore[method-assign]
        started = time.perf_counter()
        engine.step()
        total = time.perf_counter() - started
        self.model.forward, self.model.logits, self.executor.submit = forward, logits, submit  # type: ignore[method-assign]
        input_ids, positions, kv = calls[0]
        if (
            new > 1 and not whole_prompt
        ):  # a verification, which the scheduler does not ask for: the model alone
            input_ids, positions, kv = self._verify(positions, kv, context, new)
            started = time.perf_counter()
            hidden = forward(input_ids, positions, kv)
            timed["model"] = time.perf_counter() - started
            started = time.perf_counter()
            logits(hidden)
            timed["logits"] = time.perf_counter() - started
            total = timed["submit"] = timed["model"] + timed["logits"]
        for i in range(sequences):
            engine.abort(f"r{i}")
        engine.step()
        return {
            "total": total,
            "scheduler": total - timed["submit"],
            "inputs and sampling": timed["submit"] - timed["model"] - timed["logits"],
            "logits": timed["logits"],
            "model": timed["model"],
            **self._operations(input_ids, positions, kv),
        }

    def _requests(self, scheduler: Scheduler) -> list[Any]:
        return [r for group in scheduler._roster.groups.values() for r in group]

    def _verify(
        self, positions: torch.Tensor, kv: KVContext, context: int, new: int
    ) -> tuple[Any, Any, KVContext]:
        from llmtool_kernels.attention import AttentionBatch

        (old,) = kv.batches
        end = context + 1
        tokens = self.parts.pages.tokens_per_page
        batch = AttentionBatch.build([new], [end], [old.block_tables[0].tolist()], tokens)
        ids = torch.arange(new) + 100
        return ids, torch.arange(end - new, end), KVContext(kv.arena, kv.layers, (batch,))

    def _operations(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv: KVContext
    ) -> dict[str, float]:
        rotations = [rope(positions) for rope in self.model._ropes]
        state = StepState(input_ids, kv.arena, kv.batches, rotations)
        seconds = dict.fromkeys(PARTS.values(), 0.0)
        for part in self.model._parts:
            assert isinstance(part, Program)
            for kind, taken in part.profile(state):
                seconds[PARTS[kind]] += taken
        return seconds

    def floors(self, sequences: int, context: int, new: int, limit: dict[str, float]) -> dict[str, float]:
        """Milliseconds that what linears, attention and logits read and multiply takes at least."""
        spec, group = self.model.spec, self.parts.pages
        head = self.model._head
        tokens = sequences * new
        layer_bytes = self.model.weight_bytes - head.nbytes
        layer_flops = 2 * tokens * (spec.num_parameters - head.weight.n * head.weight.k)
        kv_bytes = sequences * context * group.bytes_per_token
        keys = tokens * (context - (new - 1) / 2)  # pairs of a query and a key that it sees
        kv_flops = 4 * keys * spec.num_heads * spec.head_dim * spec.num_layers

        def floor(read: float, flops: float) -> float:
            return 1e3 * max(read / limit["bytes_per_second"], flops / limit["flops"])

        # Logits are computed for one token of a sequence.
        rows = sequences if new == context else tokens
        return {
            "linears": floor(layer_bytes, layer_flops),
            "attention": floor(kv_bytes, kv_flops),
            "logits": floor(head.nbytes, 2 * rows * head.weight.n * head.weight.k),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native = kernels()
    assert native is not None, "this benchmark is of the C++ kernels, and they cannot be built here"
    limit = limits(native, args.repeats)
    print(f"{native.isa}: {limit['bytes_per_second'] / 1e9:.1f} GB/s, {limit['flops'] / 1e9:.0f} GFLOP/s")
    results = []
    for quantization in (None, "int8", "int4"):
        bench = Bench(quantization, args.threads)
        for name, shape in STEPS.items():
            row = bench.step(*shape, args.repeats)
            floors = bench.floors(*shape, limit)
            row["meeting and calls"] = row["model"] - sum(row[part] for part in PARTS.values())
            results.append(
                {"weights": quantization or "bfloat16", "step": name, "ms": row, "floor_ms": floors}
            )
            print(f"\n{quantization or 'bfloat16'}, {name}: {row['total']:.2f} ms")
            for part, ms in row.items():
                if part not in ("total", "model"):
                    bound = (
                        f"   {ms / floors[part]:.2f}x its floor of {floors[part]:.2f}"
                        if part in floors
                        else ""
                    )
                    print(f"  {part:24} {ms:8.2f}{bound}")
    if args.save:
        save("cpu_steps", {"isa": native.isa, "threads": args.threads, "limits": limit, "steps": results})


if __name__ == "__main__":
    main()
