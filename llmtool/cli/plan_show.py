"""What `llmtool plan` prints for people: the table, sentences, lines to run."""

from __future__ import annotations

from typing import Any

from llmtool.cli.output import Output
from llmtool.cli.plan_problem import Problem
from llmtool.hardware import DeviceSpec, load_devices
from llmtool.modelspec.catalogue import names
from llmtool.plan import report
from llmtool.plan.search import Outcome, SearchResult
from llmtool.plan.workloads import NAMED
from llmtool.sim.engines import load_engines

LINES = 2  # of an engine's command lines that are printed
COLUMNS = (
    "plan",
    "tokens",
    "seqs",
    "weights/KV",
    "tok/s/device",
    "TTFT mean",
    "p99",
    "TPOT mean",
    "p90",
    "goodput",
    "$/Mtok",
    "J/Mtok",
    "bound by",
    "",
)


def show(output: Output, problem: Problem, result: SearchResult, document: dict[str, Any], top: int) -> None:
    simulated = result.simulated
    tied = {id(o) for o in report.ties(simulated, problem.tier.band)}
    front = {id(o) for o in report.pareto(simulated)}
    rows = []
    for o, same in report.distinct(simulated)[:top]:
        group = [o, *same]
        marks = []
        if any(x is result.best for x in group):
            marks.append("best")
        elif any(id(x) in tied for x in group):
            marks.append("tie")
        if any(id(x) in front for x in group):
            marks.append("Pareto")
        if not o.meets:
            marks.append("misses SLO")
        if same:
            marks.append(f"same with {len(same)} larger limits")
        rows.append(_row(o, ", ".join(marks)))
    counts = document["counts"]
    note = (
        f"{counts['enumerated']} plans: {counts['infeasible']} infeasible, {counts['bounded_out']} bounded out, "
        f"{counts['halved_out']} lost a round, {counts['simulated']} simulated. Times in ms, "
        f"±{problem.tier.band:.0%} ({problem.tier.name}: {problem.tier.source})."
    )
    w = problem.workload
    load = f"{w.concurrency} clients" if w.concurrency else f"{w.rate:.3g} requests/s"
    title = (
        f"{problem.model} on {problem.cluster.num_devices} x {problem.cluster.device.title}, {w.name}, {load}, by "
        f"{result.objective.kind}"
    )
    output.table(title, COLUMNS, rows, note)
    for reason in document["rejected"]:
        output.hint(f"{reason['count']} plans rejected: {reason['reason']}, as {reason['example']}")
    if "heuristic" in document and document["heuristic"]["speedup"] > 1.0005:
        output.line(f"The usual choice, {document['heuristic']['why']}")
    elif "heuristic" in document:
        output.line("The usual choice is the best here.")
    price = problem.objective.price
    if price is not None:
        output.hint(f"Price: {price.usd_per_hour:g} $ per device and hour ({price.note}).")
    _show_answers(output, document)
    launch = document["launch"]
    for name in ("llmtool", "vllm", "sglang"):
        lines = [launch[name]] if isinstance(launch.get(name), str) else launch.get(name, [])
        for line in lines[:LINES]:
            output.line(line)
        if len(lines) > LINES:
            output.line(f"# ... and {len(lines) - LINES} more like these; --json has all")
    output.line(launch["bench"])


def _row(o: Outcome, marks: str) -> tuple[str, ...]:
    f, d = o.figures, o.deployment
    dollars = f["usd_per_million_tokens"]
    goodput = f["request_goodput"]
    return (
        f"{d.plan}, {d.drafting}" if d.drafting else str(d.plan),
        str(d.budget),
        str(d.max_seqs),
        f"{d.dtype}/{d.kv_dtype}",
        f"{f['output_tokens_per_s_per_device']:.1f}",
        f"{f['mean_ttft_ms']:.0f}",
        f"{f['p99_ttft_ms']:.0f}",
        f"{f['mean_tpot_ms']:.1f}",
        f"{f['p90_tpot_ms']:.1f}",
        "-" if goodput is None else f"{goodput:.2f}",
        "-" if dollars is None else f"{dollars:.2f}",
        f"{f['joules_per_million_tokens']:.3g}",
        f["bound"],
        marks,
    )


def _show_answers(output: Output, document: dict[str, Any]) -> None:
    if "what_if" in document:
        rows = []
        for x in ({"question": "as planned", **document["plans"][0]}, *document["what_if"]):
            if "infeasible" in x:
                rows.append((x["question"], x["infeasible"], "", "", "", ""))
                continue
            figures_ = (x["output_tokens_per_s_per_device"], x["mean_ttft_ms"], x["mean_tpot_ms"])
            dollars = x["usd_per_million_tokens"]
            cost = "-" if dollars is None else f"{dollars:.2f}"
            met = "yes" if x["meets_slos"] else "no"
            rows.append((x["question"], *(f"{v:.1f}" for v in figures_), cost, met))
        columns = ("question", "tok/s/device", "TTFT ms", "TPOT ms", "$/Mtok", "meets SLOs")
        output.table("What if", columns, rows)
    if "capacity" in document:
        c = document["capacity"]
        if c["held"] is None:
            output.line("The best plan holds the objectives at no load.")
        else:
            output.line(f"The best plan holds the objectives up to {c['held']:.3g} {c['unit']}.")
    for x in document.get("disaggregated", [])[:3]:
        output.line(
            f"Disaggregated: {x['prefill']} for prefill, {x['decode']} for decode: "
            f"TTFT {x['mean_ttft_ms']:.0f} ms, TPOT {x['mean_tpot_ms']:.1f} ms, "
            f"{x['output_tokens_per_s_per_device']:.1f} tokens/s per device"
        )


def show_catalogue(output: Output, devices_file: str | None) -> None:
    devices = load_devices(devices_file)
    output.document(
        {
            "models": names(),
            "devices": {n: d.title for n, d in devices.items()},
            "engines": {n: p.source for n, p in load_engines().items() if "@" not in n},
            "workloads": {n: w.source for n, w in NAMED.items()},
        }
    )
    output.line(f"Models: {', '.join(names())}")
    output.line(f"Engines: {', '.join(n for n in load_engines() if '@' not in n)}")
    output.line(f"Workloads: {', '.join(NAMED)}")
    output.table(
        "Devices", ("name", "title", "TFLOPS bf16", "GB", "GB/s"), [_device_row(d) for d in devices.values()]
    )


def _device_row(d: DeviceSpec) -> tuple[str, ...]:
    return d.name, d.title, f"{d.flops['bf16'] / 1e12:g}", f"{d.memory / 1e9:.0f}", f"{d.bandwidth / 1e9:g}"
