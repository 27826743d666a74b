"""Measured runs as cases: what ran, on what, under which load, and what was measured. Any file of these formats.

apex: summary.csv and requests.csv.gz (github microsoft/apex_plus, MIT): vLLM 0.6.0, Llama-3.1-70B and others on
H100s; rows that are not self-consistent are cumulative counters and left out. silicon: silicon_sample.csv.gz (PyPI
aiconfigurator-core, Apache-2.0): closed loops of `concurrency` clients. per request: folders with meta.json and
requests.jsonl (github casys-kaist/LLMServingSim, MIT): vLLM 0.19.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmtool.errors import LLMToolError
from llmtool.hardware import Cluster, find_device
from llmtool.modelspec.catalogue import published
from llmtool.sim.deployment import Deployment
from llmtool.sim.engines import EngineProfile
from llmtool.sim.grid import Tables
from llmtool.sim.ir import ModelIR, read_ir
from llmtool.sim.ops import WEIGHT_BYTES, Ops, load_pack
from llmtool.sim.parallel import ParallelPlan, why_invalid
from llmtool.sim.profile import import_profile
from llmtool.sim.simulate import SimResult, simulate
from llmtool.sim.workload import Workload
from llmtool.workload.traces import TraceRow

PER_CLIENT = 10  # requests that a client of the silicon rows' benchmark sends
LENGTHS_FROM = 0.8  # their lengths are uniform in [0.8, 1] of the nominal ones


@dataclass(frozen=True)
class Case:
    """group: cases that differ in nothing but the plan. split: what a held-out split goes by."""

    id: str
    source: str
    engine: str
    device: str
    model: str
    deployment: Deployment
    workload: Workload
    measured: dict[str, float]
    group: str = ""
    split: str = ""
    tables: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def run(self, engine: EngineProfile) -> SimResult:
        device = find_device(self.device)
        deployment = replace(self.deployment, engine=engine)
        ops = ops_of(self.device) if self.tables is None else Ops(device, self.tables)
        return simulate(deployment, Cluster(device, deployment.plan.devices), ops, self.workload)


@cache
def ops_of(device: str) -> Ops:
    spec = find_device(device)
    return Ops(spec, load_pack(spec))


@cache
def model(name: str) -> ModelIR:
    config = published(name)
    if config is None:
        raise LLMToolError(f"{name} is not in the catalogue.")
    return read_ir(config, name)


_BLANK = EngineProfile("blank", 0.0)


def apex(directory: Path) -> Iterator[Case]:
    requests: dict[str, list[TraceRow]] = {}
    with gzip.open(directory / "requests.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            lengths = int(row["prompt_tokens"]), int(row["output_tokens"])
            requests.setdefault(row["run"], []).append(TraceRow(float(row["arrival_s"]), *lengths))
    with (directory / "summary.csv").open() as file:
        for row in csv.DictReader(file):
            if row["self_consistent"] != "1" or row["run"] not in requests:
                continue
            name, *_ = row["model"].split()
            known = known_as(name)
            if known is None:
                print("left out:", row["run"], "of an unknown model", name)
                continue
            rows = tuple(sorted(requests[row["run"]], key=lambda r: r.arrival or 0.0))
            workload = Workload(row["run"], rows)
            dtype = "fp8" if "fp8" in row["model"].lower() else "bf16"
            deployment = Deployment(
                model(known),
                ParallelPlan(tp=int(row["tp"])),
                _BLANK,
                dtype,
                "bf16",
                512,
                256,
                workload.max_len,
            )
            yield Case(
                row["run"],
                "apex",
                "vllm-0.6",
                "h100",
                known,
                deployment,
                workload,
                {
                    "ttft": float(row["mean_ttft_ms"]),
                    "tpot_tokens": float(row["tpot_ms_sum_over_tokens"]),
                    "latency": float(row["total_latency_s"]),
                },
                group=re.sub(r"_(validation|\d*DP\d+TP|\d+TP).*", "", row["run"]),
                extra={"dp": int(row["dp_total"]), "tp": int(row["tp"])},
            )


def known_as(name: str) -> str | None:
    """The catalogue's name of a model path."""
    base = name.split("/")[-1].lower()
    for suffix in ("", "-instruct", "-fp8", "-nvfp4"):
        base = base.removesuffix(suffix)
    for candidate in (
        base,
        base.removesuffix("-fp8").removesuffix("-instruct"),
        base.replace("-instruct", ""),
    ):
        candidate = re.sub(r"-(2507|v\d+\.\d+)$", "", candidate).removesuffix("-instruct")
        if published(candidate) is not None:
            return candidate
    return None


SYSTEMS = {
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "b200_sxm": "b200",
    "gb200": "gb200",
    "b300_sxm": "",
    "gb300": "",
}
# The file does not say what the KV cache was kept in. For vLLM on H100 only 16 bits explain its queues: with 64
# clients of 1,024 + 8,192 tokens on two devices fp8 would have room for all, and TTFT was 60 times what that means.
KV_IN_16_BITS = {("vllm", "h100")}
BLOCKWISE = ("deepseek", "qwen3", "minimax")


def silicon(path: Path) -> Iterator[Case]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for row in csv.DictReader(file):
            case = _silicon(row)
            if case is not None:
                yield case


def _silicon(row: dict[str, str]) -> Case | None:
    """None for rows that cannot be told: disaggregated, unknown devices and models, and those whose attention ranks
    are more than a node's devices (their columns multiply TP by EP)."""
    device, known = SYSTEMS.get(row["system"], ""), known_as(row["model_path"])
    if row["mode"] != "agg" or not device or known is None:
        return None

    def number(name: str) -> int:
        return int(float(row[name])) if row[name] else 1

    tp, adp, ep, pp = (number(f"{n}_size") for n in ("tp", "attention_dp", "moe_ep", "pp"))
    if tp * adp * pp > 8:
        return None
    precision = row["precision"] or "bf16"
    dtype = precision
    if precision == "fp8" and any(word in known for word in BLOCKWISE):
        dtype = "fp8_block"
    plan = ParallelPlan(tp=tp, pp=pp, attention_dp=adp, ep=ep)
    if why_invalid(plan, model(known)) or dtype not in WEIGHT_BYTES:
        return None
    found = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    clients = int(found[1]) if found else number("batch_size") * adp
    isl, osl = int(row["isl"]), int(row["osl"])
    count = min(clients * PER_CLIENT, clients + 1500)
    rng = np.random.default_rng(0)
    inputs = rng.integers(round(isl * LENGTHS_FROM), isl + 1, count)
    outputs = rng.integers(round(osl * LENGTHS_FROM), osl + 1, count)
    rows = tuple(TraceRow(None, int(a), int(b)) for a, b in zip(inputs, outputs, strict=True))
    workload = Workload(row["id"], rows, clients)
    kv_dtype = "bf16" if precision == "bf16" or (row["backend"], device) in KV_IN_16_BITS else "fp8"
    deployment = Deployment(
        model(known), plan, _BLANK, dtype, kv_dtype, 8192, max(1, min(1024, clients)), workload.max_len
    )
    same = (known, device, row["backend"], row["backend_version"], precision, isl, osl, clients)
    return Case(
        row["id"],
        "silicon",
        row["backend"],
        device,
        known,
        deployment,
        workload,
        {"ttft": float(row["silicon_ttft_ms"]), "tpot": float(row["silicon_tpot_ms"])},
        group=" ".join(map(str, same)),
        split=f"{known} {device} {isl} {osl} {clients} {plan}",
        extra={
            "isl": isl,
            "osl": osl,
            "clients": clients,
            "moe": model(known).is_moe,
            "precision": precision,
        },
    )


def _with_wires(tables: Tables, device: str) -> Tables:
    """A layer profile has no collectives: the pack's."""
    pack = load_pack(find_device(device))
    assert pack is not None
    wires = {k: v for k, v in pack.grids.items() if k.startswith(("all_", "reduce_"))}
    return Tables({**wires, **tables.grids}, tables.device, tables.source)


CARDS = {"RTXPRO6000": "rtx-pro-6000", "RTX4090": "rtx-4090"}


def per_request(runs: Path, profiles: Path) -> Iterator[Case]:
    """Every folder CARD/MODEL with meta.json and requests.jsonl; the card's profile of the model is its table."""
    for meta_file in sorted(runs.glob("*/*/meta.json")):
        card, folder = meta_file.parts[-3], meta_file.parent
        meta = json.loads(meta_file.read_text())
        known, kwargs = known_as(meta["model"]), meta["engine_kwargs"]
        profile = profiles / card / meta["model"] / "bf16"
        if known is None or card not in CARDS or not profile.exists():
            print("left out:", folder, "(no profile, or an unknown model or card)")
            continue
        requests = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
        first = min(r["arrival_time"] for r in requests)
        requests.sort(key=lambda r: r["arrival_time"])
        rows = tuple(TraceRow(r["arrival_time"] - first, r["input_toks"], r["output_toks"]) for r in requests)
        workload = Workload(f"{card}/{known}", rows)
        dp, tp = kwargs["data_parallel_size"], kwargs["tensor_parallel_size"]
        ir, device = model(known), find_device(CARDS[card])
        joined = kwargs["enable_expert_parallel"] and ir.is_moe
        plan = ParallelPlan(tp=tp, attention_dp=dp, ep=dp * tp) if joined else ParallelPlan(tp=tp, dp=dp)
        deployment = Deployment(
            ir,
            plan,
            _BLANK,
            budget=kwargs["max_num_batched_tokens"],
            max_seqs=kwargs["max_num_seqs"],
            max_len=workload.max_len,
        )
        ttft = [(r["first_token_ts"] - r["queued_ts"]) * 1e3 for r in requests]
        e2e = [(r["last_token_ts"] - r["queued_ts"]) * 1e3 for r in requests]
        tpot = [
            (r["last_token_ts"] - r["first_token_ts"]) / (r["output_toks"] - 1) * 1e3
            for r in requests
            if r["output_toks"] > 1
        ]
        measured = {}
        for name, values in (("ttft", ttft), ("tpot", tpot), ("e2el", e2e)):
            measured[name] = float(np.mean(values))
            measured[f"{name}_p99"] = float(np.percentile(values, 99))
        yield Case(
            f"{card}/{known}",
            "per_request",
            "vllm",
            CARDS[card],
            known,
            deployment,
            workload,
            measured,
            tables=_with_wires(import_profile(profile, ir, tp, device), CARDS[card]),
        )
