"""What a step over several processes costs beside its kernels, and whether `plan` foresees it.

python benchmarks/parallel_overhead.py [--model smollm2-135m] [--rounds 5] [--wires-only]

First two processes on gloo, of one machine: a step's decision made into integers, broadcast and taken apart; sums
of a stage; hidden states to the next stage; logits back. Then engines of one process, of tensor parallel 2 and of
two stages, each rank with one thread, which decode in turn, by rounds: seconds a token. And a prediction: the
planner's own simulation, with the measured wires as its table of collectives, and the two constants of its device
(of what kernels reach) fitted to runs of two engines of one process side by side, so that what the two ranks of
one engine take from each other, of memory and of caches, is in them. Wants a quiet machine of two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from common import save

from llmtool.config import EngineConfig
from llmtool.core.ports import ScheduledRequest, SchedulerOutput
from llmtool.core.request import SamplingParams
from llmtool.hardware import Cluster, find_device
from llmtool.models.resolve import resolve
from llmtool.modelspec.catalogue import read_config
from llmtool.runtime.async_engine import AsyncEngine
from llmtool.sim.collectives import wire_seconds
from llmtool.sim.deployment import Deployment
from llmtool.sim.engines import find_engine
from llmtool.sim.grid import Tables, grid
from llmtool.sim.ir import read_ir
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.simulate import simulate
from llmtool.sim.workload import Workload
from llmtool.workload.traces import TraceRow

TOKENS = (1, 4, 16, 64, 256)  # of a step
BATCHES = (1, 4, 8)  # sequences that decode together
PROMPT, OUTPUT = 48, 64
TIMES = 200
PLANS = {"one process": (1, 1), "tensor parallel 2": (2, 1), "2 stages": (1, 2)}


# -- wires -------------------------------------------------------------------------------------------------------


def wires(rank: int, port: int, hidden: int, vocab: int, answers: Any) -> None:
    """One of two processes; rank 0 puts medians of seconds into `answers`."""
    import torch
    import torch.distributed as dist

    from llmtool.parallel.mesh import Mesh
    from llmtool.runtime.parallel.links import Links
    from llmtool.runtime.parallel.wire import Numbers, decode, encode

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sums, stages = Mesh(tp=2), Mesh(pp=2)
    peers = Links(sums, sums.place(rank), torch.device("cpu"), 60.0).peers
    links = Links(stages, stages.place(rank), torch.device("cpu"), 60.0)
    found: dict[str, dict[str, float]] = {}

    def measure(kind: str, size: int, call: Callable[[], object]) -> None:
        for _ in range(10):
            call()
        seconds = []
        for _ in range(TIMES):
            dist.barrier()
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        found.setdefault(kind, {})[str(size)] = statistics.median(seconds)

    for n in TOKENS:
        x = torch.zeros(n, hidden)
        measure("sum", n, lambda x=x: peers.sum(x))
        measure("gather", n, lambda x=x, n=n: peers.gather(x, [n, n]))
        measure("exchange", n, lambda x=x, n=n: peers.exchange(x, [n - n // 2, n // 2], _halves(n, rank)))

        def on(x: Any = x, n: int = n) -> None:
            if rank == 0:  # there and back: half of it is one way
                links.send_on(x)
                links.receive_back([torch.empty(1, 1)], [1])
            else:
                links.receive((n, hidden), torch.float32)
                links.send_back(torch.zeros(1, 1))

        measure("to the next stage, and a word back", n, on)
    for n in BATCHES:
        logits = torch.zeros(n, vocab)

        def back(logits: Any = logits) -> None:
            if rank == 0:
                links.receive_back([torch.empty_like(logits)], [1])
            else:
                links.send_back(logits)

        measure("logits back", n, back)
        numbers = Numbers()
        for i in range(n):
            numbers.new(str(i))
        entries = [ScheduledRequest(str(i), 100, 1, True, (5,), ((512 * i,),)) for i in range(n)]
        out = SchedulerOutput(7, scheduled=entries, num_tokens=n)
        rows = [np.arange(n)]

        def tell(out: SchedulerOutput = out, numbers: Any = numbers, rows: Any = rows) -> None:
            if rank == 0:
                links.tell(encode(out, rows, numbers))
                links.flush()
            else:
                decode(links.hear())

        measure("decision", n, tell)
    if rank == 0:
        answers.put(found)
    dist.barrier()
    os._exit(0) if rank else None


def _halves(n: int, rank: int) -> list[int]:
    mine = n - n // 2 if rank == 0 else n // 2
    return [mine, mine]


def measure_wires(hidden: int, vocab: int) -> dict[str, dict[str, float]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=wires, args=(r, port, hidden, vocab, answers)) for r in range(2)]
    for process in processes:
        process.start()
    found = answers.get(timeout=600)
    for process in processes:
        process.join(30)
    return found


# -- engines -----------------------------------------------------------------------------------------------------


def config_of(model: str, tp: int, pp: int) -> EngineConfig:
    return EngineConfig(
        model=model,
        device="cpu",
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        num_threads=1,
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**28,
    )


async def decode_seconds(engine: AsyncEngine, batch: int, seed: int) -> float:
    """Mean seconds between tokens of `batch` sequences that start together."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    streams = [
        await engine.add(f"{seed}-{i}", rng.integers(100, 20000, PROMPT).tolist(), params)
        for i in range(batch)
    ]

    async def read(stream: Any) -> float:
        times = []
        async for output in stream:
            times += [time.perf_counter()] * len(output.token_ids)
        return (times[-1] - times[7]) / (len(times) - 8)  # the first few share steps with prompts

    return statistics.mean(await asyncio.gather(*(read(stream) for stream in streams)))


async def measure_engines(model: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    engines = {name: await AsyncEngine.start(config_of(model, *shape)) for name, shape in PLANS.items()}
    twin = await AsyncEngine.start(config_of(model, 1, 1))
    seconds: dict[str, dict[str, list[float]]] = {}
    try:
        for turn in range(rounds + 1):
            for batch in BATCHES:
                seed = turn * 100 + batch
                for name, engine in engines.items():
                    took = await decode_seconds(engine, batch, seed)
                    if turn:  # the first is for caches
                        seconds.setdefault(name, {}).setdefault(str(batch), []).append(took)
                both = await asyncio.gather(
                    decode_seconds(engines["one process"], batch, seed),
                    decode_seconds(twin, batch, seed + 50),
                )
                if turn:
                    seconds.setdefault("two beside each other", {}).setdefault(str(batch), []).append(
                        statistics.mean(both)
                    )
    finally:
        for engine in (*engines.values(), twin):
            await engine.close()
    return seconds


# -- the planner -------------------------------------------------------------------------------------------------


def predict(
    model: str, dtype: str, wired: dict[str, dict[str, float]], measured: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Seconds between tokens, by plan and batch, from the simulation. What kernels reach is fitted to `two beside
    each other`: one factor on memory and compute alike, and the host's part of a step."""
    ir = read_ir(read_config(str(resolve(model))), model)
    device = find_device("cpu")
    own = wired["sum"]
    nbytes = [2.0 * int(n) * ir.hidden for n in own]  # as the simulation counts a vector
    wire = [wire_seconds("all_reduce", size, 2, device.link) for size in nbytes]
    ratios = np.log([seconds / base for seconds, base in zip(own.values(), wire, strict=True)])
    ops = Ops(device, Tables({"all_reduce/2": grid((nbytes,), ratios)}, device.name, "this machine"))
    told = statistics.median(wired["decision"].values())
    sent = wired["to the next stage, and a word back"]["1"] / 2

    def tpot(plan: ParallelPlan, host: float, factor: float, batch: int) -> float:
        engine = replace(find_engine("llmtool"), host_step=host, host_seq=0.0, compute=factor, memory=factor)
        d = Deployment(ir, plan, engine, dtype, dtype, 512, 16, 256)
        rows = tuple(TraceRow(0.0, PROMPT, OUTPUT) for _ in range(batch))
        cluster = Cluster(device, plan.devices, max(2, plan.devices))
        return simulate(d, cluster, ops, Workload("decode", rows)).statistic("tpot", None) / 1e3

    both = measured["two beside each other"]
    # Two unknowns, least squares over the batches: the simulation is linear in both.
    rows = []
    for batch in BATCHES:
        base, one = (tpot(ParallelPlan(), 0.0, factor, batch) for factor in (1.0, 2.0))
        rows.append((one - base, 1.0, both[str(batch)] - (2 * base - one)))
    table = np.array(rows)
    factor, host = np.linalg.lstsq(table[:, :2], table[:, 2], rcond=None)[0]
    plans = {
        "tensor parallel 2": (ParallelPlan(tp=2), host + told),
        "2 stages": (ParallelPlan(pp=2), host + told + sent),
    }
    return {
        name: {str(batch): tpot(plan, max(0.0, own_host), factor, batch) for batch in BATCHES}
        for name, (plan, own_host) in plans.items()
    }


def medians(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {k: statistics.median(v) for k, v in each.items()} for name, each in seconds.items()}


def table(title: str, rows: dict[str, dict[str, float]], unit: float, columns: Sequence[str]) -> None:
    print(f"\n{title}")
    for name, each in rows.items():
        print(f"  {name:36}", *(f"{each[c] * unit:9.1f}" if c in each else " " * 9 for c in columns))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wires-only", action="store_true")
    args = parser.parse_args()
    config = read_config(str(resolve(args.model)))
    wired = measure_wires(config["hidden_size"], config["vocab_size"])
    columns = sorted({c for each in wired.values() for c in each}, key=int)
    table(f"microseconds, for {', '.join(columns)} tokens or sequences", wired, 1e6, columns)
    result: dict[str, Any] = {"model": args.model, "wires_seconds": wired}
    if not args.wires_only:
        runs = asyncio.run(measure_engines(args.model, args.rounds))
        measured = medians(runs)
        predicted = predict(args.model, "bf16", wired, measured)
        batches = [str(b) for b in BATCHES]
        table(f"milliseconds a token, for {', '.join(batches)} sequences", measured, 1e3, batches)
        table("predicted", predicted, 1e3, batches)
        errors = {
            name: {b: each[b] / measured[name][b] - 1 for b in batches} for name, each in predicted.items()
        }
        table("predicted over measured - 1, %", errors, 100, batches)
        result |= {"runs_seconds": runs, "predicted_seconds": predicted, "errors": errors}
    save("parallel_overhead", result)


if __name__ == "__main__":
    main()
