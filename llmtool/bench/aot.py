"""`llmtool bench --aot`: a net's step run eagerly, compiled, captured and scheduled ahead of time, side by side.

Imports torch: this bench runs its nets in this process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.bench.nets import NETS, Net, build
from llmtool.errors import LLMToolError, ModelError, UsageError
from llmtool.models.resolve import resolve
from llmtool.runtime.aot.cost import GRAPH_COST, SyncCost
from llmtool.runtime.aot.executor import AotExecutor
from llmtool.runtime.aot.machine import planned
from llmtool.runtime.aot.order import order
from llmtool.runtime.aot.prepare import Plan
from llmtool.runtime.aot.streams import assign, width

LENGTH = 128  # tokens of a sequence where a model is given
WARMUPS = 3
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class AotBenchConfig:
    """batches: sizes to measure. seconds: for the turns of one size. peers: also run torch.compile, which takes
    seconds to minutes each. tiny: the nets' small twins. sync: measured costs of forks and joins."""

    batches: tuple[int, ...] = (1,)
    seconds: float = 3.0
    peers: bool = True
    tiny: bool = False
    sync: SyncCost | None = None


@dataclass(slots=True)
class Row:
    """One batch size. seconds: of a step, medians of interleaved turns; prepare: to get there; failed: why one has
    no figure. plan: of the schedule that AoT took, with every candidate's own time."""

    batch: int
    seconds: dict[str, float] = field(default_factory=dict)
    prepare: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    def ratio(self, other: str) -> float | None:
        """How many times faster AoT is."""
        both = "aot" in self.seconds and other in self.seconds
        return self.seconds[other] / self.seconds["aot"] if both else None


def net_of(name: str, batch: int, config: AotBenchConfig, device: torch.device) -> Net:
    """One of NETS, or the body of a model: directory, hub id or alias."""
    if name in NETS:
        net = build(name, batch, config.tiny)
        net.module.to(device)
        return Net(net.module, lambda b: tuple(t.to(device) for t in net.inputs(b)), net.branchy)
    try:
        directory = resolve(name)
    except LLMToolError as error:
        raise UsageError(error.message, f"A model, or one of {', '.join(NETS)}.") from None
    from transformers import AutoModel

    try:
        module = AutoModel.from_pretrained(directory).eval().to(device)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"transformers cannot load {name}: {first}", "Give another model.") from None
    vocab = module.config.vocab_size
    module.config.use_cache = False
    return Net(_Body(module), lambda b: (torch.randint(vocab, (b, LENGTH), device=device),))


class _Body(nn.Module):
    """Hidden states alone: transformers' outputs have types of their own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor) -> Tensor:
        return self.module(input_ids=ids).last_hidden_state


def measure(name: str, config: AotBenchConfig, device: torch.device, progress: Progress) -> list[Row]:
    rows = []
    for at, batch in enumerate(config.batches):
        progress(f"{name}, batch {batch}", at / len(config.batches))
        with torch.no_grad():
            rows.append(_row(net_of(name, batch, config, device), batch, config, device))
    return rows


def _row(net: Net, batch: int, config: AotBenchConfig, device: torch.device) -> Row:
    row, inputs = Row(batch), net.inputs(batch)
    runs: dict[str, Callable[[], object]] = {"eager": lambda: net.module(*inputs)}
    started = time.perf_counter()
    fast = AotExecutor(net.module, inputs, always=True, sync=config.sync or GRAPH_COST).prepare()
    row.prepare["aot"] = time.perf_counter() - started
    explained = fast.explain()
    if explained.plans:
        runs["aot"] = lambda: fast(*inputs)
        row.plan = explained.document()["plans"][0] | {"assignments": assignments(explained.plans[0])}
    else:
        row.failed["aot"] = explained.fallbacks[0].reason
    if device.type == "cuda":
        _add(row, runs, "cuda graph", lambda: captured(net.module, inputs))
    if config.peers:
        modes = ("default", "reduce-overhead", "max-autotune") if device.type == "cuda" else ("default",)
        for mode in modes:
            what = "torch.compile" if mode == "default" else mode
            _add(row, runs, what, lambda mode=mode: compiled(net.module, inputs, mode))  # type: ignore[misc]
    row.seconds = side_by_side(runs, config.seconds, device)
    return row


def _add(
    row: Row,
    runs: dict[str, Callable[[], object]],
    name: str,
    make: Callable[[], Callable[[], object]],
) -> None:
    started = time.perf_counter()
    try:
        runs[name] = make()
    except Exception as error:  # a peer that fails is a result too
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        row.failed[name] = f"{type(error).__name__}: {first[:160]}"
    row.prepare[name] = time.perf_counter() - started


def compiled(module: nn.Module, inputs: Sequence[Tensor], mode: str) -> Callable[[], object]:
    torch._dynamo.reset()
    """The module through torch.compile, warmed up."""
    run = torch.compile(module, mode=mode)
    for _ in range(WARMUPS):
        run(*inputs)
    return lambda: run(*inputs)


def captured(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """One stream, captured as it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(*inputs)
    return graph.replay


def side_by_side(
    runs: dict[str, Callable[[], object]], seconds: float, device: torch.device, least: int = 5
) -> dict[str, float]:
    """Seconds of each, the median of turns that alternate."""
    for run in runs.values():
        for _ in range(WARMUPS):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    began, turn = time.perf_counter(), 0
    while turn < least or (time.perf_counter() - began < seconds and turn < 2000):
        for name, run in runs.items():
            _synchronize(device)
            started = time.perf_counter()
            run()
            _synchronize(device)
            times[name].append(time.perf_counter() - started)
        turn += 1
    return {name: statistics.median(taken) for name, taken in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def assignments(plan: Plan) -> dict[str, dict[str, int | float]]:
    """What ours, the paper's and its code's assignment of the same task graph need, and one stream; and the arena
    of each against none of its bytes used twice."""
    assert plan.machine is not None
    graph, program = plan.machine.graph, plan.machine.program
    table: dict[str, dict[str, int | float]] = {}
    for label, mode in (("ours", "exact"), ("paper", "paper"), ("code", "code"), ("serial", "serial")):
        made = assign(graph, mode)
        arena = planned(program, graph, made)
        table[label] = {
            "streams": made.num_streams,
            "synchronisations": made.synchronisations,
            "arena_bytes": arena.nbytes,
            "arena_least_bytes": arena.least,
            "no_reuse_bytes": arena.no_reuse,
        }
    table["graph"] = {
        "tasks": len(graph),
        "edges": len(graph.edges),
        "concurrency": width(order(len(graph), graph.edges)),
    }
    return table
