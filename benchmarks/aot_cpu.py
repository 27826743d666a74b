"""Ahead-of-time replay on a CPU against eager modules and torch.compile, interleaved in one run.

- nets at batch 1, tiny and full: what leaving the framework out of the way gives;
- SmolLM2-135M's decoding step (its shapes, random weights, 256 tokens of context), in float32 and bfloat16;
- the same step as `serve` runs it, one call into the C++ list of operations, against torch's operators, and against
  the step before, eager and through torch.compile.

python benchmarks/aot_cpu.py [--seconds 4] [--threads 2] [--quick] [--save]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from common import save
from llmtool_kernels.attention import AttentionBatch

from llmtool.bench.aot import AotBenchConfig, Row, compiled, net_of, side_by_side
from llmtool.bench.nets import DecoderShape, build
from llmtool.config import EngineConfig
from llmtool.models.decoder import KVContext
from llmtool.runtime.aot.executor import AotExecutor
from llmtool.runtime.aot.prepare import fastest
from llmtool.runtime.executor import TorchExecutor, build_engine

TINY = ("mlp", "bert", "decoder", "moe", "resnet", "mobilenet", "inception", "nasnet")
FULL = ("distilbert", "pruned-bert", "resnet", "mobilenet", "efficientnet", "inception", "nasnet", "moe")
CPU = torch.device("cpu")
CONTEXT = 256


def nets(names: tuple[str, ...], tiny: bool, seconds: float, peers: bool) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        config = AotBenchConfig((1,), seconds, peers, tiny)
        with torch.no_grad():
            net = net_of(name, 1, config, CPU)
            rows.append(
                {"net": f"{name}{', tiny' if tiny else ''}", **against(net.module, net.inputs(1), config)}
            )
        print(shown(rows[-1]), flush=True)
    return rows


def against(module: torch.nn.Module, inputs: tuple[Any, ...], config: AotBenchConfig) -> dict[str, Any]:
    """Milliseconds of a step of each, and how many times slower than AoT they are. fuse: within
    rounding of eager, as torch.compile is; the others are equal to it in every bit. bare: the replay alone, without
    the executor's look at shapes, settings and weights before it. chosen: whether the executor would replay."""
    row = Row(1)
    fast = AotExecutor(module, inputs, always=True).prepare()
    (plan,) = fast.explain().plans
    runs: dict[str, Callable[[], object]] = {
        "eager": lambda: module(*inputs),
        "bare": lambda: plan.replay(*inputs),
        "aot": lambda: fast(*inputs),
    }
    if config.peers:
        joined = AotExecutor(module, inputs, always=True, fuse=True).prepare()
        runs["aot, fuse"] = lambda: joined(*inputs)
        runs["torch.compile"] = compiled(module, inputs, "default")
    row.seconds = side_by_side(runs, config.seconds, CPU)
    return {
        "ms": {name: 1e3 * s for name, s in row.seconds.items()},
        "aot_over": {name: row.ratio(name) for name in row.seconds if name != "aot"},
        "bare_over_eager": row.seconds["eager"] / row.seconds["bare"],
        "chosen": fastest(plan),
        "tasks": plan.tasks,
        "arena_bytes": plan.arena,
        "outside_arena_bytes": plan.loose,
        "prepare_seconds": plan.prepare_seconds,
    }


def shown(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
    ratios = f"aot {row['aot_over']['eager']:.2f}x eager, bare {row['bare_over_eager']:.2f}x"
    return f"{row['net']:28} {times} ms; {ratios}"


def decoder(dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    net = build("decoder", 1)
    module = net.module.to(dtype)
    with torch.no_grad():
        return {
            "net": f"smollm2 step, {dtype}",
            **against(module, net.inputs(1), AotBenchConfig((1,), seconds)),
        }


def served(seconds: float, context: int) -> dict[str, Any]:
    """The engine's model step and logits on the C++ operations and on torch's, the embedded SmolLM2 in bfloat16;
    and a step of the same shapes and context as a plain module."""
    runs: dict[str, Callable[[], object]] = {}
    ids, positions = torch.tensor([100]), torch.tensor([context])
    for kind in ("native", "off"):
        os.environ["LLMTOOL_CPU_KERNELS"] = "" if kind == "native" else "off"
        parts = build_engine(EngineConfig(kv_cache_memory_bytes=2**28), lambda text, fraction: None)
        assert isinstance(parts.executor, TorchExecutor)
        model, store = parts.executor.model, parts.executor.store
        pages = [i * store.group.page_units for i in range(store.group.pages(context + 1))]
        batch = AttentionBatch.build([1], [context + 1], [pages], store.group.tokens_per_page)
        kv = KVContext(store.arena, parts.executor._layers, (batch,))
        runs["program" if kind == "native" else "torch operators"] = (
            lambda model=model, kv=kv: model.logits(model.forward(ids, positions, kv))  # type: ignore[misc]
        )
    net = build("decoder", 1)
    module, inputs = net.module.to(torch.bfloat16), net.inputs(1)
    runs["module, eager"] = lambda: module(*inputs)
    with torch.no_grad():
        runs["module, torch.compile"] = compiled(module, inputs, "default")
    with torch.no_grad():
        times = side_by_side(runs, seconds, CPU)
    return {
        "ms": {k: 1e3 * s for k, s in times.items()},
        "program_over": {k: s / times["program"] for k, s in times.items() if k != "program"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few small steps: that all of it runs")
    parser.add_argument("--only", choices=("tiny", "full", "decoder", "serve"), help="this part alone")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    assert DecoderShape().layers == 30, "SmolLM2-135M's shape"
    data: dict[str, Any] = {"threads": args.threads}
    if args.quick:
        data["tiny"] = nets(("mlp", "decoder"), True, 0.1, False)
    else:
        parts: dict[str, Callable[[], Any]] = {
            "tiny": lambda: nets(TINY, True, args.seconds, False),
            "full": lambda: nets(FULL, False, args.seconds, True),
            "decoder": lambda: [decoder(t, args.seconds) for t in (torch.bfloat16, torch.float32)],
            "serve": lambda: served(args.seconds, CONTEXT),
        }
        for name, part in parts.items():
            if args.only in (None, name):
                data[name] = part()
                print(name, data[name] if name in ("decoder", "serve") else "", flush=True)
    if args.save:
        save("aot_cpu" if args.only is None else f"aot_cpu_{args.only}", data)


if __name__ == "__main__":
    main()
