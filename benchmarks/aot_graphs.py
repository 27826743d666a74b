"""Streams, synchronisations and arena of ahead-of-time schedules: ours, the paper's, its code's. Counts.

- random DAGs: how often the released code waits more than it must, and the paper's streams are not the fewest;
- nets: task graphs of BERT, decoder, mixture, Inception- and NASNet-like nets at full size, batch 1;
- cost: seconds of the exact assignment for random DAGs of 600 tasks (the only figure here that is measured).

python benchmarks/aot_graphs.py [--tiny] [--save]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import combinations
from typing import Any

import torch
from common import save

from llmtool.bench.nets import build
from llmtool.runtime.aot.executor import exported
from llmtool.runtime.aot.machine import planned
from llmtool.runtime.aot.order import order
from llmtool.runtime.aot.record import record
from llmtool.runtime.aot.streams import assign, width
from llmtool.runtime.aot.tasks import TaskGraph

NETS = ("bert", "pruned-bert", "decoder", "moe", "resnet", "mobilenet", "inception", "nasnet")
MODES = {"ours": "exact", "paper": "paper", "code": "code", "serial": "serial"}


def random_dags(count: int, seed: int = 1) -> dict[str, Any]:
    """Of 5 to 14 tasks, each pair an edge with probability 0.15, 0.3 or 0.5."""
    draw = random.Random(seed)
    waits = streams = fewer = 0
    for _ in range(count):
        n, density = draw.randrange(5, 15), draw.choice((0.15, 0.3, 0.5))
        graph = TaskGraph.of(n, [e for e in combinations(range(n), 2) if draw.random() < density])
        ours, paper, code = (assign(graph, mode) for mode in ("exact", "paper", "code"))
        assert ours.synchronisations == paper.synchronisations
        waits += code.synchronisations > ours.synchronisations
        streams += paper.num_streams > ours.num_streams
        fewer += paper.num_streams - ours.num_streams
    return {
        "dags": count,
        "code_waits_more": waits,
        "paper_has_more_streams": streams,
        "streams_spared": fewer,
    }


def net(name: str, tiny: bool) -> dict[str, Any]:
    made = build(name, 1, tiny)
    inputs = made.inputs(1)
    with torch.no_grad():
        step = exported(made.module, inputs, {})
        recorder, _, _ = record(step, list(inputs), bound=False)
    program = recorder.program
    graph = program.graph()
    row: dict[str, Any] = {
        "net": name,
        "tasks": len(graph),
        "edges": len(graph.edges),
        "concurrency": width(order(len(graph), graph.edges)),
    }
    for label, mode in MODES.items():
        started = time.perf_counter()
        chosen = assign(graph, mode)
        seconds = time.perf_counter() - started
        arena = planned(program, graph, chosen)
        row[label] = {
            "streams": chosen.num_streams,
            "synchronisations": chosen.synchronisations,
            "arena_bytes": arena.nbytes,
            "least_bytes": arena.least,
            "of_no_reuse": arena.no_reuse / arena.nbytes,
            "assignment_seconds": seconds,
        }
        row["no_reuse_bytes"] = arena.no_reuse
    return row


def exact_seconds(repeats: int, n: int = 600) -> dict[str, float]:
    draw, times = random.Random(9), []
    for _ in range(repeats):
        graph = TaskGraph.of(
            n, {(draw.randrange(max(0, v - 40), v), v) for v in range(1, n) for _ in range(2)}
        )
        started = time.perf_counter()
        assign(graph, "exact")
        times.append(time.perf_counter() - started)
    return {"tasks": n, "median_seconds": statistics.median(times), "most_seconds": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the nets' small twins: that all of it runs")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    dags = [random_dags(50 if args.tiny else count) for count in (400, 3000)]
    for row in dags:
        print(row)
    rows = []
    columns = (
        "net",
        "tasks",
        "at once",
        "streams",
        "paper",
        "waits",
        "paper",
        "code",
        "arena MB",
        "serial",
        "x",
    )
    print("".join(f"{c:>12}" for c in columns))
    for name in NETS:
        row = net(name, args.tiny)
        rows.append(row)
        ours, paper = row["ours"], row["paper"]
        cells = (
            *(name, row["tasks"], row["concurrency"], ours["streams"], paper["streams"]),
            *(ours["synchronisations"], paper["synchronisations"], row["code"]["synchronisations"]),
            f"{ours['arena_bytes'] / 1e6:.2f}",
            f"{row['serial']['arena_bytes'] / 1e6:.2f}",
            f"{ours['of_no_reuse']:.1f}",
        )
        print("".join(f"{c:>12}" for c in cells), flush=True)
    cost = exact_seconds(3 if args.tiny else 15)
    print(cost)
    if args.save:
        save("aot_graphs", {"random_dags": dags, "nets": rows, "exact_assignment": cost})


if __name__ == "__main__":
    main()
