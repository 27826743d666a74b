"""How far predictions are from measured runs; and, with --fit, the engines' constants.

python benchmarks/plan/accuracy.py [--data DIR] [--fit] [--only apex silicon per_request] [--processes 2]
    [--apex DIR ...] [--silicon FILE.csv.gz ...] [--per-request DIR PROFILES]

DIR holds apex_measured/, aiconfigurator/silicon_sample.csv.gz, llmservingsim_bench/ and llmservingsim_profile/; any
files of these formats will do, given one by one (cases.py). Kernel times are the built-in packs', except per
request, where they are the card's own layer profile. Constants come from llmtool/sim/engines.toml, and were fitted
(--fit) on
  vllm-0.6: two runs of APEX, FIT_APEX below; every other run is held out
  vllm, sglang, trtllm: of each engine's silicon rows, half of the configurations (model, device, lengths, plan),
  by a
    hash of the configuration; of those, FIT_ROWS rows. The other half is held out, and scored apart.
Nothing is fitted on the per-request runs: no constant of any engine is in them (UNCORRECTED).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from cases import Case, apex, per_request, silicon
from common import machine
from results import RESULTS

from llmtool.errors import LLMToolError
from llmtool.plan.fit import Observation, figure, fit_engine
from llmtool.sim.engines import FITTED, EngineProfile, find_engine, load_engines

DATA = Path(os.environ.get("LLMTOOL_DATA", "../shared/data")) / "plan-truth"
ENGINES = Path(__file__).parents[2] / "llmtool" / "sim" / "engines.toml"
FIT_APEX = ("llama_lmsys_05_validation_8TP", "llama_creation_05_validation_2DP4TP_1")
FIT_ROWS = 10
# A run against the profile of its own card, taken inside the same engine: nothing to correct. Its moments are the
# engine's own, not a client's; and that version prepares a step while the one before runs, so that of a host's time
# nothing is left of steps this long (20 ms and more).
UNCORRECTED = {
    "host_step": 0.0, "host_seq": 0.0, "compute": 1.0, "memory": 1.0, "network": 1.0, "attention": 1.0,
    "request": 0.0,
}  # fmt: skip
# What each profile is fitted on: (engine, device or "" for any, model).
FITS = {
    "vllm@h100": ("vllm", "h100", "llama-3.1-70b"),
    "vllm@h200": ("vllm", "h200", "llama-3.1-70b"),
    "vllm@b200": ("vllm", "b200", "llama-3.1-70b"),
    "sglang": ("sglang", "", "llama-3.1-8b"),
    "trtllm": ("trtllm", "", "llama-3.1-70b"),
}


def in_fit_half(case: Case) -> bool:
    return int(hashlib.sha256(case.split.encode()).hexdigest(), 16) % 2 == 0


def fit_cases(cases: Sequence[Case], name: str) -> list[Case]:
    if name == "vllm-0.6":
        return [c for c in cases if c.id in FIT_APEX]
    engine, device, model = FITS[name]
    own = [
        c
        for c in cases
        if c.source == "silicon" and c.engine == engine and c.model == model and in_fit_half(c)
    ]
    own = [c for c in own if device in ("", c.device) and c.extra["precision"] == "fp8"]
    return sorted(own, key=lambda c: hashlib.sha256(c.id.encode()).hexdigest())[:FIT_ROWS]


def fit(cases: Sequence[Case], only: Sequence[str]) -> None:
    """Fit every profile that has cases, and write llmtool/sim/engines.toml."""
    for name in only or ("vllm-0.6", *FITS):
        chosen = fit_cases(cases, name)
        if not chosen:
            continue
        observations = []
        for case in chosen:
            measured = {k: v for k, v in case.measured.items() if k in ("ttft", "tpot", "tpot_tokens")}
            observations.append(Observation(case.run, measured))
        profile = fit_engine(find_engine(name.split("@")[0]), observations, evaluations=5)
        where = "APEX" if name == "vllm-0.6" else "AIConfigurator's silicon sample"
        source = f"{where}: {', '.join(c.id for c in chosen)}"
        print(name, profile, flush=True)
        write_engines({**load_engines(), name: replace(profile, source=source)})


def write_engines(profiles: dict[str, EngineProfile]) -> None:
    lines = ["# Constants of engines; see EngineProfile. Fitted by benchmarks/plan/accuracy.py --fit."]
    default = EngineProfile("", 0.0)
    for name, p in profiles.items():
        lines += ["", f'["{name}"]' if "." in name or "@" in name else f"[{name}]"]
        for key in (*FITTED, "budget", "max_seqs", "utilization", "reserve"):
            value = getattr(p, key)
            if value != getattr(default, key) or key == "host_step":
                lines.append(f"{key} = {value:.4g}" if isinstance(value, float) else f"{key} = {value}")
        lines.append(f"source = {json.dumps(p.source)}")
    ENGINES.write_text("\n".join(lines) + "\n")
    tomllib.loads(ENGINES.read_text())


def score(case: Case) -> dict[str, Any] | None:
    try:
        engine = find_engine(case.engine, case.device)
        if case.source == "per_request":
            engine = replace(engine, **UNCORRECTED)
        result = case.run(engine)
    except LLMToolError as error:
        return {"id": case.id, "failed": error.message, **about(case)}
    predicted = {}
    for name in case.measured:
        if name == "latency":
            predicted[name] = sum(r.e2e for r in result.records)
        elif name.endswith("_p99"):
            predicted[name] = result.statistic(name.removesuffix("_p99"), 99)
        else:
            predicted[name] = figure(result, name)
    errors = {k: predicted[k] / v - 1 for k, v in case.measured.items()}
    held = not in_fit_half(case) if case.source == "silicon" else case.id not in FIT_APEX
    return {
        "id": case.id,
        **about(case),
        "held_out": held,
        "predicted": predicted,
        "measured": case.measured,
        "errors": errors,
        "bound": result.bound,
    }


def about(case: Case) -> dict[str, Any]:
    moe = case.deployment.ir.is_moe
    return {"source": case.source, "engine": case.engine, "device": case.device, "model": case.model, "moe": moe,
            "group": case.group, "plan": str(case.deployment.plan), "extra": case.extra}  # fmt: skip


def mean_absolute(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [abs(r["errors"][name]) for r in rows if name in r.get("errors", {})]
    return round(float(np.mean(values)), 4) if values else None


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    done = [r for r in rows if "errors" in r]
    names = sorted({name for r in done for name in r["errors"]})
    return {"rows": len(done), "failed": len(rows) - len(done), **{n: mean_absolute(done, n) for n in names}}


def summaries(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    apex_rows = [r for r in rows if r["source"] == "apex"]
    if apex_rows:
        out["apex, held out"] = summary([r for r in apex_rows if r.get("held_out")])
        out["apex, all"] = summary(apex_rows)
    by: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        if r["source"] == "silicon":
            kind = "MoE" if r["moe"] else "dense"
            for key in (
                f"silicon {kind}, held out, {r['engine']}",
                f"silicon {kind}, held out",
                f"silicon {r['model']} {r['extra']['precision']} {r['engine']} {r['device']}, held out",
            ):
                if r.get("held_out", True):
                    by[key].append(r)
            by[f"silicon {kind}, all"].append(r)
            if r["model"] == "llama-3.1-70b" and r["extra"]["precision"] == "fp8" and r["engine"] == "vllm":
                by[
                    "Llama-70B fp8 vLLM, " + ("held out" if r.get("held_out", True) else "fitted half")
                ].append(r)
    out |= {key: summary(by[key]) for key in sorted(by)}
    for r in rows:
        if r["source"] == "per_request":
            out[f"per request {r['id']}"] = {k: round(v, 4) for k, v in r["errors"].items()}
    return out


def choices(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """In every group of runs that differ in the plan alone: is the predicted best the measured best, or within 5 %?

    APEX: latency per output token over all replicas of a plan. Silicon: output tokens per second and device.
    """
    out = {}
    for source in ("apex", "silicon"):
        groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for r in rows:
            if r["source"] == source and "errors" in r:
                plan = f"{r['extra']['dp']}x{r['extra']['tp']}" if source == "apex" else r["plan"]
                groups[r["group"]][plan].append(r)
        verdicts = {}
        for name, plans in groups.items():
            if len(plans) > 1:
                cost = _apex_cost if source == "apex" else _silicon_cost
                predicted = {p: cost(rs, "predicted") for p, rs in plans.items()}
                measured = {p: cost(rs, "measured") for p, rs in plans.items()}
                chosen = min(predicted, key=lambda p: predicted[p])
                best = min(measured, key=lambda p: measured[p])
                regret = measured[chosen] / measured[best] - 1
                verdicts[name] = {"chosen": chosen, "best": best, "regret": round(regret, 4)}
        good = sum(v["regret"] <= 0.05 for v in verdicts.values())
        worst = {k: v for k, v in verdicts.items() if v["regret"] > 0.05}
        out[source] = {"groups": len(verdicts), "best_or_within_5_percent": good, "others": worst}
    return out


def _apex_cost(rows: Sequence[dict[str, Any]], side: str) -> float:
    return float(np.mean([r[side]["tpot_tokens"] for r in rows]))


def _silicon_cost(rows: Sequence[dict[str, Any]], side: str) -> float:
    """Device-seconds per output token."""
    out = []
    for r in rows:
        seconds = (r[side]["ttft"] + r[side]["tpot"] * (0.9 * r["extra"]["osl"] - 1)) / 1e3
        devices = int(np.prod([int(p) for p in _degrees(r["plan"])]))
        out.append(seconds * devices / (r["extra"]["clients"] * 0.9 * r["extra"]["osl"]))
    return float(np.mean(out))


def _degrees(plan: str) -> list[str]:
    words = [w for w in plan.split() if not w.startswith("EP")]
    return ["".join(c for c in w if c.isdigit()) for w in words if any(c.isdigit() for c in w)] or ["1"]


def read_cases(args: argparse.Namespace, thin: bool = True) -> list[Case]:
    """Of the files that are given; of --data where none is. thin: as --every says."""
    given = any((args.apex, args.silicon, args.per_request))
    data: Path = args.data
    runs = args.apex if given else [data / "apex_measured"]
    files = args.silicon if given else [data / "aiconfigurator" / "silicon_sample.csv.gz"]
    benches = args.per_request if given else [data / "llmservingsim_bench", data / "llmservingsim_profile"]
    cases: list[Case] = []
    if "apex" in args.only:
        cases += [c for directory in runs for c in apex(directory)]
    if "silicon" in args.only:
        rows = [c for file in files for c in silicon(file)]
        chosen = [c for c in rows if re.search(args.match, f"{c.id} {c.model} {c.engine} {c.device}")]
        every = args.every if thin else 1
        cases += [c for i, c in enumerate(chosen) if i % every == 0 or _whole(args.whole, c)]
    if "per_request" in args.only and benches:
        cases += per_request(*benches)
    return cases


def _whole(pattern: str, case: Case) -> bool:
    return bool(pattern) and re.search(pattern, f"{case.id} {case.model} {case.engine}") is not None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--apex", type=Path, nargs="*", default=[], help="folders like apex_measured")
    parser.add_argument(
        "--silicon", type=Path, nargs="*", default=[], help="files like silicon_sample.csv.gz"
    )
    parser.add_argument("--per-request", type=Path, nargs=2, default=[], help="runs and layer profiles")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--fit-only", nargs="*", default=[], help="profiles to fit, such as vllm@h100")
    parser.add_argument("--only", nargs="*", default=["apex", "silicon", "per_request"])
    parser.add_argument("--every", type=int, default=1, help="score every n-th silicon row")
    parser.add_argument("--whole", default="", help="whatever --every says, every row whose id matches")
    parser.add_argument("--match", default="", help="score silicon rows whose id matches this expression")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-o", "--output", default="accuracy")
    args = parser.parse_args()
    if args.fit:
        fit(read_cases(args, thin=False), args.fit_only)
    cases = read_cases(args)
    if not cases:
        raise SystemExit("No case of these files can be told.")
    with ProcessPoolExecutor(args.processes) as pool:
        scored = [r for r in pool.map(score, cases, chunksize=4) if r is not None]
    report = {
        "summaries": summaries(scored),
        "choices": choices(scored),
        "silicon_rows": {"every": args.every, "whole": args.whole, "match": args.match},
        "engines": {k: {f: getattr(p, f) for f in (*FITTED, "source")} for k, p in load_engines().items()},
    }
    print(json.dumps(report["summaries"], indent=1))
    print(json.dumps(report["choices"], indent=1)[:4000])
    RESULTS.mkdir(exist_ok=True)
    kept = [{k: v for k, v in r.items() if k not in ("group", "extra", "measured")} for r in scored]
    for r in kept:
        for key in ("errors", "predicted"):
            r[key] = {k: round(v, 4) for k, v in r.get(key, {}).items()}
    lines = ",\n".join(json.dumps(r) for r in kept)
    text = json.dumps({**report, "machine": machine()}, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]\n}}\n'
    (RESULTS / f"{args.output}.json").write_text(text)


if __name__ == "__main__":
    main()
