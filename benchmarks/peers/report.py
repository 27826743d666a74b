"""Targets and verdicts: what llmtool must reach beside the best peer, from the cells that are there.

A figure is the median over rounds; a ratio is llmtool's median over the peer's. `spread` is the ratio's least and
largest value inside one round, where both ran. A PASS needs every peer of the row; where one was not measured it is
INCOMPLETE, and a row without llmtool's own figure is MISSING, never left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.catalogue import Contender
from benchmarks.peers.cells import Cell, Store
from benchmarks.peers.measure import median
from benchmarks.peers.workload import RATES, online

QUIET = 0.05  # part of the machine that others may take before a cell counts as disturbed


@dataclass(frozen=True, slots=True)
class Target:
    """ours: the contender that must reach `limit` times the best of `peers`, or `limit` itself without peers.
    at_least: the ratio must be `limit` or more, not `limit` or less.
    """

    row: str
    ours: str
    mode: str
    metric: str
    limit: float
    peers: tuple[str, ...] = ()
    at_least: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """verdict: PASS, MISS, INCOMPLETE or MISSING. ours, best: medians in the metric's unit. peers: each
    one's median, or None. reasons: one for each contender that is missing. disturbed: cells of the row, see QUIET.
    """

    row: str
    metric: str
    target: str
    verdict: str
    ours: float | None = None
    best_peer: str = ""
    best: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    rounds: int = 0
    disturbed: int = 0
    peers: dict[str, float | None] | None = None
    reasons: tuple[str, ...] = ()


def targets(catalogue: dict[str, Contender]) -> list[Target]:
    peers = [c for c in catalogue.values() if c.engine != "llmtool"]
    wide = tuple(c.name for c in peers if c.bits == 16 and "single" in c.modes)
    narrow = tuple(c.name for c in peers if c.bits <= 8 and "single" in c.modes)
    lookup = tuple(c.name for c in peers if "copy" in c.modes and "single" not in c.modes)
    vllm = ("vllm-bf16",)
    single, bf16 = "single stream 512 in / 128 out", "llmtool-bf16"
    rows = [
        Target(f"16 bit, {single}: TPOT", bf16, "single", "tpot_median_ms", 0.75, wide),
        Target(f"int8, {single}: TPOT", "llmtool-int8", "single", "tpot_median_ms", 0.6, narrow),
        Target(f"int4, {single}: TPOT", "llmtool-int4", "single", "tpot_median_ms", 0.6, narrow),
        Target("16 bit, 64 mixed requests offline: output", bf16, "batch", "output_tok_s", 1.25, wide, True),
        Target("16 bit, 512-token prompt: TTFT", bf16, "single", "ttft_median_ms", 0.9, wide),
    ]
    for rate in RATES:
        for name, metric in (("mean", "e2el_mean_ms"), ("p99", "e2el_p99_ms")):
            row = f"online, {rate:g} requests/s: {name} latency"
            rows.append(Target(row, bf16, online(rate), metric, 0.8, vllm))
    rows += [
        Target("copying, single stream, drafts: TPOT", "llmtool-auto", "copy", "tpot_median_ms", 0.9, lookup),
        *(
            Target(
                f"copying, 16 at a time, drafts: {name}",
                "llmtool-auto",
                "copy-16",
                metric,
                1.0,
                (bf16,),
                at_least,
            )
            for name, metric, at_least in (
                ("output", "output_tok_s", True),
                ("mean latency", "e2el_mean_ms", False),
                ("p99 latency", "e2el_p99_ms", False),
            )
        ),
        Target("command to first token, warm", bf16, "start", "seconds", 3.0),
        Target("peak RSS of all processes", bf16, "memory", "peak_rss_gb", 2.0),
        Target("32 requests, 1,024 tokens shared, cold", bf16, "prefix", "seconds", 0.7, vllm),
    ]
    return rows


def judge(target: Target, store: Store) -> Verdict:
    unit = _unit(target.metric)
    sign = "≥" if target.at_least else "≤"
    wanted = f"{sign} {target.limit:g}" + ("x" if target.peers else f" {unit}")
    ours = store.values(target.ours, target.mode, target.metric)
    theirs = {p: store.values(p, target.mode, target.metric) for p in target.peers}
    medians = {p: median(v) for p, v in theirs.items()}
    reasons = [f"{p}: {_why(p, target.mode, store)}" for p, m in medians.items() if m is None]
    mine = median(ours)
    if mine is None:
        reasons.insert(0, f"{target.ours}: {_why(target.ours, target.mode, store)}")
    common: dict[str, Any] = {"peers": medians or None, "ours": mine, "rounds": len(ours)}
    common["reasons"] = tuple(reasons)
    common["disturbed"] = sum(
        c.foreign + c.stolen > QUIET
        for name in (target.ours, *target.peers)
        for c in store.cells(name, target.mode)
    )
    known = {p: m for p, m in medians.items() if m is not None}
    if mine is None or (target.peers and not known):
        return Verdict(target.row, target.metric, wanted, "MISSING", **common)
    if not target.peers:
        verdict = "PASS" if mine <= target.limit else "MISS"
        return Verdict(target.row, target.metric, wanted, verdict, **common)
    best = (max if target.at_least else min)(known, key=lambda p: known[p])
    ratio = mine / known[best]
    good = ratio >= target.limit if target.at_least else ratio <= target.limit
    # A peer that is missing could only make a MISS worse, but could turn a PASS.
    verdict = "MISS" if not good else "PASS" if len(known) == len(target.peers) else "INCOMPLETE"
    inside = [ours[r] / theirs[best][r] for r in ours if r in theirs[best]]
    return Verdict(
        target.row, target.metric, wanted, verdict,
        best_peer=best, best=known[best], ratio=round(ratio, 3),
        spread=(round(min(inside), 3), round(max(inside), 3)) if inside else None,
        **common,
    )  # fmt: skip


def _why(contender: str, mode: str, store: Store) -> str:
    errors = [c.error for c in store.cells(contender, mode) if c.error]
    return errors[-1] if errors else "not measured"


def _unit(metric: str) -> str:
    for end, unit in (("_ms", "ms"), ("_gb", "GB"), ("tok_s", "tok/s"), ("seconds", "s")):
        if metric.endswith(end):
            return unit
    return ""


def agreement(store: Store, catalogue: dict[str, Contender]) -> dict[str, float]:
    """Part of the greedy text that each contender shares with llmtool's at 16 bit, from its start; of its best
    prompt. Other precisions part ways somewhere; 0 on every prompt is another model or another prompt.
    """
    texts = {
        c.contender: list(map(str, c.metrics["texts"]))
        for c in store.cells(mode="single")
        if c.metrics.get("texts")
    }
    reference = texts.get("llmtool-bf16", [])

    def shared(ours: str, theirs: str) -> float:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
        return sum(1 for _ in same) / max(1, len(ours))

    return {
        name: round(max(map(shared, reference, texts[name])), 3)
        for name in catalogue
        if name in texts and reference
    }


def figures(store: Store) -> dict[str, dict[str, dict[str, Any]]]:
    """contender -> mode -> metric -> {"median", "values" by round}; and why a mode failed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in store.cells():
        at = found.setdefault(cell.contender, {}).setdefault(cell.mode, {})
        if cell.error:
            at["error"] = cell.error
            continue
        for metric, value in cell.metrics.items():
            if isinstance(value, int | float) and metric not in at:
                values = store.values(cell.contender, cell.mode, metric)
                at[metric] = {"median": median(values), "values": list(values.values())}
    return found


def noise(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the machine gave: the probes' range, and the part that others took while something was measured."""
    out: dict[str, Any] = {"cells": len(cells)}
    for name in ("read_gb_s", "gemm_gflop_s"):
        values = sorted({c.at: c.probe[name] for c in cells if name in c.probe}.values())
        if values:
            out[name] = {"min": values[0], "median": values[len(values) // 2], "max": values[-1]}
    taken = sorted(c.foreign + c.stolen for c in cells if c.mode not in ("start", "memory") and not c.error)
    if taken:
        out["taken_by_others"] = {"median": taken[len(taken) // 2], "max": taken[-1]}
    return out


def document(store: Store, catalogue: dict[str, Contender]) -> dict[str, Any]:
    return {
        "run": store.run,
        "targets": [asdict(judge(t, store)) for t in targets(catalogue)],
        "figures": figures(store),
        "greedy_text_shared_with_llmtool_bf16": agreement(store, catalogue),
        "noise": noise(store.cells()),
    }


def table(verdicts: Sequence[dict[str, Any]]) -> str:
    """The targets as text."""
    rows_of = {v["row"]: i + 1 for i, v in enumerate(verdicts)}
    head = ("", "target", "llmtool", "best peer", "ratio (in rounds)", "wanted", "verdict")
    rows = [head]
    for v in verdicts:
        unit = _unit(v["metric"])
        ours = "-" if v["ours"] is None else f"{v['ours']:.4g} {unit}"
        best = "-" if v["best"] is None else f"{v['best']:.4g} {v['best_peer']}"
        spread = f" ({v['spread'][0]:g}-{v['spread'][1]:g})" if v["spread"] else ""
        ratio = "-" if v["ratio"] is None else f"{v['ratio']:.2f}{spread}"
        noisy = f", {v['disturbed']} cells disturbed" if v["disturbed"] else ""
        rows.append((str(rows_of[v["row"]]), v["row"], ours, best, ratio, v["target"], v["verdict"] + noisy))
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    reasons: dict[str, list[str]] = {}
    for v in verdicts:
        for reason in v["reasons"]:
            reasons.setdefault(reason, []).append(v["row"])
    for reason, missing in reasons.items():
        lines.append(f"{reason} (rows {', '.join(str(rows_of[r]) for r in missing)})")
    return "\n".join(lines)
