"""Ahead-of-time execution on a GPU: what a fork costs, the nets, the seed's training steps, decoding in the engine.

python benchmarks/gpu/aot.py [--dry-run] [--seconds 560]

- edges: chains of small kernels in a CUDA graph, with and without forks and joins, and with programmatic dependent
  launch; the costs go into the gate of the nets' schedules.
- nets: batch 1 against eager, the one-stream CUDA graph, reduce-overhead and max-autotune replay.
- training: the seed's table (2012.02732, section 5: batch 32, CIFAR shapes) against eager steps.
- engine: decoding steps of the whole engine with captured steps and without (`--enforce-eager`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A machine with a GPU may have torch and no more: the checkout is then what runs.
sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in (".", "kernels")]

import decode  # noqa: E402
import targets  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from measure import RESULTS, Budget, reason, save, synchronized, table  # noqa: E402

from llmtool.bench.aot import AotBenchConfig, measure, side_by_side  # noqa: E402
from llmtool.bench.nets import build  # noqa: E402
from llmtool.models.decoder import NativeDecoder  # noqa: E402
from llmtool.models.weights import allocate, fill_random  # noqa: E402
from llmtool.modelspec import ModelSpec  # noqa: E402
from llmtool.runtime.aot.cost import SyncCost  # noqa: E402
from llmtool.runtime.aot.cuda import CudaRuntime  # noqa: E402
from llmtool.runtime.aot.executor import AotExecutor  # noqa: E402
from llmtool.runtime.aot.steps import Capture, CudaCapture  # noqa: E402

NETS = (
    *("distilbert", "bert", "mobilenet", "efficientnet", "inception", "nasnet", "decoder-0.6b"),
    *("moe", "resnet", "decoder"),
)
TRAINING = ("resnet", "mobilenet", "efficientnet")
LAUNCHES = 256


def edges(device: torch.device) -> dict[str, float | str]:
    """Microseconds: of a launch along a chain, more of it per fork and join, and of a launch after a fork."""
    x = [torch.zeros(1024, device=device) for _ in range(2)]

    def chain(runtime: CudaRuntime, every: int) -> None:
        """A side launch beside every so many of the chain, 0 for none."""
        runtime.begin(2)
        start = runtime.record(0)
        runtime.wait(1, start)
        for i in range(LAUNCHES):
            runtime.launch(0, lambda: x[0].add_(1))
            if every and i % every == 0:
                runtime.wait(1, runtime.record(0))
                runtime.launch(1, lambda: x[1].add_(1))
                runtime.wait(0, runtime.record(1))
        runtime.wait(0, runtime.record(1))

    seconds = {}
    for name, every in (("chain", 0), ("fork_every_8", 8), ("fork_every_64", 64), ("one_fork", LAUNCHES)):
        runtime = CudaRuntime(device)
        chain(runtime, every)
        seconds[name] = replayed(runtime.end(), device)
    forks = LAUNCHES // 8
    own = seconds["chain"] / LAUNCHES
    return {
        "launch_us": 1e6 * own,
        # Each fork also has a launch of its own, in the shadow of the chain's next.
        "fork_and_join_us": 1e6 * (seconds["fork_every_8"] - seconds["chain"]) / forks,
        "fork_and_join_rare_us": 1e6 * (seconds["fork_every_64"] - seconds["chain"]) / (LAUNCHES // 64),
        "one_fork_slows_chain_by": seconds["one_fork"] / seconds["chain"],
    } | pdl(device)


def pdl(device: torch.device) -> dict[str, float | str]:
    """The chain as Triton kernels, with programmatic dependent launch and without."""
    try:
        import dependent

        runs = {name: dependent.chain(LAUNCHES, on, device) for name, on in (("off", False), ("on", True))}
        return {
            f"triton_launch_pdl_{name}_us": 1e6 * replayed(run, device) / LAUNCHES
            for name, run in runs.items()
        }
    except Exception as error:  # a figure that a version of Triton cannot give
        return {"triton_launch_pdl": reason(error)}


def replayed(run: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(60):
        started = synchronized(device)
        run()
        times.append(synchronized(device) - started)
    return statistics.median(times[10:])


def training(name: str, tiny: bool, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of a training step at batch 32, eager and ahead of time, of twins that stay equal."""
    torch.manual_seed(0)
    batch = 4 if tiny else 32
    runs: dict[str, Callable[[], object]] = {}
    steps = {}
    x = torch.randn(batch, 3, 32, 32, device=device)
    y = torch.randint(10, (batch,), device=device)
    for kind in ("eager", "aot"):
        module = build(name, batch, tiny, cifar=True).module.to(device).train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        step = AotExecutor(
            module, (x, y), loss=lambda m, x, y: F.cross_entropy(m(x), y), optimizer=optimizer, always=True
        )
        if kind == "eager":
            runs[kind] = lambda step=step: step._eager((x, y), {})  # type: ignore[misc]
        else:
            for _ in range(3):
                step(x, y)
            runs[kind] = lambda step=step: step(x, y)  # type: ignore[misc]
        steps[kind] = step
    took = side_by_side(runs, seconds, device)
    explained = steps["aot"].explain()
    plan = explained.document()["plans"]
    return {
        "net": name,
        "batch": batch,
        "eager_ms": 1e3 * took["eager"],
        "aot_ms": 1e3 * took["aot"],
        "ratio": took["eager"] / took["aot"],
        "schedule": plan[0]["schedule"] if plan else None,
        "synchronisations": plan[0]["synchronisations"] if plan else None,
        "eager_because": [f.reason for f in explained.fallbacks],
    }


class Timed:
    """A capture that notes its seconds."""

    def __init__(self, capture: Capture, seconds: list[float]) -> None:
        self._capture, self._seconds = capture, seconds

    def __call__(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        started = time.perf_counter()
        made = self._capture(step)
        self._seconds.append(time.perf_counter() - started)
        return made


def engine(
    dry_run: bool, device: torch.device, budget: Budget, captures: list[float]
) -> list[dict[str, Any]]:
    """A decoding step of the engine, captured and eager. captures: gets the seconds of each capture."""
    shape = "tiny" if dry_run else "1B"
    dtype = torch.float32 if dry_run else torch.bfloat16
    spec = ModelSpec.from_config({**decode.COMMON, **decode.SHAPES[shape]})
    weights = allocate(spec, dtype, device)
    fill_random(weights, 0)
    model = NativeDecoder(spec, weights)
    rows = []
    for batch in (2,) if dry_run else (1, 8, 32):
        load = decode.Load(batch, 20, 3, 5) if dry_run else decode.Load(batch, 512, 16, 80)
        runs = {
            "captured_ms": lambda load=load: decode.engine_run(
                model, load, None if dry_run else Timed(CudaCapture(device), captures)
            ),
            "eager_ms": lambda load=load: decode.engine_run(model, load),
        }
        figures = decode.side_by_side(runs, load, device, budget, f"engine x {batch}")
        rows.append({"model": shape, "batch": batch, **figures})
    return rows


def main(dry_run: bool, budget: Budget, directory: Path) -> dict[str, Any]:
    device = torch.device("cpu" if dry_run else "cuda")
    data: dict[str, Any] = {"dry_run": dry_run, "nets": [], "training": []}
    sync = None
    if not dry_run and budget.allows("edges", 20):
        data["edges"] = edges(device)
        print(data["edges"])
        cost = float(data["edges"]["fork_and_join_us"]) * 1e-6 / 2
        sync = SyncCost(cost, cost, float(data["edges"]["launch_us"]) * 1e-6)
    config = AotBenchConfig((1,), 0.1 if dry_run else 2.0, not dry_run, dry_run, sync)
    for name in ("mlp", "inception") if dry_run else NETS:
        if not budget.allows(name, 60):  # max-autotune compiles for most of it
            continue
        try:
            (row,) = measure(name, config, device, lambda text, fraction: None)
        except Exception as error:  # one net's trouble is a result, and the others go on
            data["nets"].append({"net": name, "failed": reason(error)})
            continue
        ratios = {f"over_{n}": row.ratio(n) for n in row.seconds if n != "aot"}
        schedule = row.plan.get("schedule")
        made = {"net": name, "aot_ms": 1e3 * row.seconds.get("aot", 0.0), "schedule": schedule, **ratios}
        data["nets"].append(
            {
                **made,
                "ms": {k: 1e3 * s for k, s in row.seconds.items()},
                "failed": row.failed,
                "plan": row.plan,
            }
        )
        print(made, row.failed, flush=True)
    for name in TRAINING:
        if budget.allows(f"training {name}", 25):
            try:
                data["training"].append(training(name, dry_run, device, config.seconds))
            except Exception as error:
                data["training"].append({"net": name, "failed": reason(error)})
    table("training, batch 32 on CIFAR shapes", data["training"])
    captures: list[float] = []
    data["engine"] = engine(dry_run, device, budget, captures)
    table("engine, ms a decoding step", data["engine"])
    data["capture_seconds"] = captures
    data["targets"] = targets.of_nets(data["nets"], data["training"], captures)
    table("targets", data["targets"])
    save("aot", {**data, "left_out": budget.left_out}, directory)
    return data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny nets on the CPU: that all of it runs")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    main(args.dry_run, Budget(args.seconds), args.out)
