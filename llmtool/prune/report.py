"""What a run found, as data: report.json, the tables, and the curve of a sweep."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmtool.errors import UsageError
from llmtool.prune.cost import KINDS, CostModel, kv_bytes, macs, params, size
from llmtool.prune.units import Kept, Sublayer


@dataclass(slots=True)
class LayerReport:
    """Of one layer: what is kept of what there was, and what that costs."""

    layer: int
    heads: int
    dense_heads: int
    kv_heads: int
    dense_kv_heads: int
    neurons: int
    dense_neurons: int
    macs: float
    params: int
    kv_bytes: int


@dataclass(slots=True)
class Report:
    """cost: kind -> (dense, small, share, budget's share or None). metric: before and after, agreement where there
    are no labels. latency: batch size -> seconds of dense and small. seconds: per phase. fits: how each sublayer
    was compensated."""

    command: str
    seed: int
    method: str
    model: str
    calibration: str
    layers: list[LayerReport] = field(default_factory=list)
    cost: dict[str, dict[str, float | None]] = field(default_factory=dict)
    metric: dict[str, dict[str, float]] = field(default_factory=dict)
    latency: dict[int, dict[str, float]] = field(default_factory=dict)
    latency_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    verified: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_reports(costs: CostModel, sublayers: Sequence[Sublayer], kept: Kept) -> list[LayerReport]:
    rows = []
    for a, m in zip(sublayers[0::2], sublayers[1::2], strict=True):
        heads, kv_heads = size(a, kept[a.index])
        neurons = len(kept[m.index])
        rows.append(
            LayerReport(
                a.layer, heads, a.num_units, kv_heads, a.num_groups, neurons, m.num_units,
                macs(costs.shape, a, heads, kv_heads) + macs(costs.shape, m, neurons, 0),
                params(costs.shape, a, heads, kv_heads) + params(costs.shape, m, neurons, 0),
                kv_bytes(costs.shape, a, kv_heads),
            )
        )  # fmt: skip
    return rows


def cost_table(
    costs: CostModel, sublayers: Sequence[Sublayer], kept: Kept, budget: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """Every kind of cost that the model has, dense and small."""
    found: dict[str, dict[str, float | None]] = {}
    for kind in KINDS:
        if kind == "latency" and costs.latency is None:
            continue
        dense, small = costs.dense(kind, sublayers), costs.total(kind, sublayers, kept)
        if dense > 0:
            found[kind] = {"dense": dense, "small": small, "share": small / dense, "budget": budget.get(kind)}
    return found


def layer_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            str(r.layer),
            f"{r.heads}/{r.dense_heads}",
            f"{r.kv_heads}/{r.dense_kv_heads}",
            f"{r.neurons}/{r.dense_neurons}",
            f"{r.macs / 1e6:.1f}",
            f"{r.params:,}",
            str(r.kv_bytes),
        )
        for r in report.layers
    ]


LAYER_COLUMNS = ("layer", "heads", "KV heads", "neurons", "MMACs", "parameters", "KV bytes/token")


def summary_rows(report: Report) -> list[tuple[str, ...]]:
    """(what, dense, small, small / dense)."""
    names = {
        "flops": "MACs per sequence",
        "params": "attention + MLP parameters",
        "kv": "KV bytes per token",
        "latency": "predicted seconds",
    }
    rows: list[tuple[str, ...]] = []
    for kind, c in report.cost.items():
        limit = "" if c["budget"] is None else f" (budget {c['budget']:g})"
        rows.append((names[kind], f"{c['dense']:.6g}", f"{c['small']:.6g}", f"{c['share']:.4f}{limit}"))
    for batch, seconds in report.latency.items():
        speed = seconds["dense"] / seconds["small"]
        rows.append(
            (
                f"ms, batch {batch} x {report.latency_tokens}",
                f"{1e3 * seconds['dense']:.2f}",
                f"{1e3 * seconds['small']:.2f}",
                f"{speed:.2f}x faster",
            )
        )
    for name, scores in report.metric.items():
        dense = scores.get("dense")
        rows.append((name, "" if dense is None else f"{dense:.4f}", f"{scores['small']:.4f}", ""))
    return rows


@dataclass(frozen=True, slots=True)
class Point:
    """One budget of a sweep."""

    share: float
    cost: float
    metric: str
    value: float
    dense: float


def write_sweep(points: Sequence[Point], kind: str, directory: Path) -> None:
    """pareto.csv and pareto.png."""
    with (directory / "pareto.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((f"budget_{kind}", f"share_{kind}", "metric", "value", "dense"))
        writer.writerows((p.share, round(p.cost, 6), p.metric, p.value, p.dense) for p in points)
    pyplot = plotter()
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([p.cost for p in points], [p.value for p in points], marker="o", label="pruned")
    axes.axhline(points[0].dense, linestyle="--", color="gray", label="dense")
    axes.set_xlabel(f"{kind}, share of dense")
    axes.set_ylabel(points[0].metric)
    axes.legend()
    figure.tight_layout()
    figure.savefig(directory / "pareto.png", dpi=120)
    pyplot.close(figure)


def plotter() -> Any:
    """matplotlib, drawing to files. Raises UsageError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "--sweep draws a curve, and matplotlib is not installed.",
            "Install it: pip install 'llmtool[plot]'",
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
