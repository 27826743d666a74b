"""The body of `llmtool plan`: flags become a search, its result tables, files and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import typer

from llmtool.cli.output import Output
from llmtool.core.routing import make_router
from llmtool.errors import InfeasibleError, UsageError
from llmtool.hardware import Cluster, DeviceSpec, find_device, load_devices
from llmtool.hardware.prices import need_price, price_of
from llmtool.modelspec.catalogue import hub_name, names, published, read_config
from llmtool.plan import report
from llmtool.plan.calibration import engine_for
from llmtool.plan.capacity import capacity
from llmtool.plan.disaggregate import better_split
from llmtool.plan.launch import bench_line, llmtool_line, sglang_lines, vllm_lines
from llmtool.plan.objective import OBJECTIVES, Objective, figures
from llmtool.plan.perfetto import write_perfetto
from llmtool.plan.planfile import write_plan
from llmtool.plan.runnable import why_no_engine
from llmtool.plan.search import Outcome, SearchResult, search
from llmtool.plan.space import Space, SpaceOptions, build_space, heuristic_plan, smallest_cluster
from llmtool.plan.tier import Tier, tier_of
from llmtool.plan.whatif import Scenario, ask
from llmtool.plan.workloads import NAMED, guess_format, make_workload, write_trace
from llmtool.sim.deployment import Deployment
from llmtool.sim.engines import load_engines
from llmtool.sim.grid import Tables
from llmtool.sim.ir import ModelIR, read_ir
from llmtool.sim.ops import KV_BYTES, WEIGHT_BYTES, Ops, load_pack
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.simulate import SimResult, simulate
from llmtool.sim.workload import Workload
from llmtool.workload.slo import parse_slos

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is to be planned."""

    model: str
    ir: ModelIR
    cluster: Cluster
    tables: Tables | None
    tier: Tier
    workload: Workload
    objective: Objective
    options: SpaceOptions


def run(output: Output, a: Arguments) -> None:
    problem = read_problem(output, a)
    cluster, options = problem.cluster, problem.options
    space = build_space(problem.ir, cluster, options)
    if not space.feasible:
        raise nothing_fits(problem, space)
    heuristic = heuristic_plan(problem.ir, cluster, options)
    with output.progress() as progress:
        result = search(
            space,
            cluster,
            problem.tables,
            problem.workload,
            problem.objective,
            exhaustive=a["exhaustive"],
            must=[heuristic] if heuristic else [],
            processes=a["processes"],
            router=a["router"],
            progress=progress,
        )
    document = report.document(result, problem.tier, heuristic)
    document |= {"model": problem.model, "device": cluster.device.name, "num_devices": cluster.num_devices}
    best = result.best
    document["launch"] = launch_lines(problem, best.deployment, a)
    if a["disaggregate"]:
        document["disaggregated"] = disaggregated(problem, a, output)
    if a["what_if"]:
        document["what_if"] = what_if(problem, best, a)
    if a["capacity"]:
        document["capacity"] = find_capacity(problem, best.deployment, a)
    write_files(problem, result, document, a)
    error = None
    if not best.meets:
        error = InfeasibleError(
            f"No plan meets {', '.join(map(str, result.objective.slos))}; the closest is {best.deployment.plan}.",
            "Loosen the objectives, lower the rate, or give more devices.",
        )
        document["error"] = {"message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
    output.document(document)
    show(output, problem, result, document, a["top"])
    if error is not None and output.as_json:  # the document has it: there is to be one
        output.warn(str(error))
        raise typer.Exit(error.exit_code)
    if error is not None:
        raise error


# -- reading flags -----------------------------------------------------------------------------------------------


def read_problem(output: Output, a: Arguments) -> Problem:
    if a["model"] is None:
        raise UsageError(
            "A model is missing.", "Give a catalogue name (--list), a config.json, a directory or a hub id."
        )
    if a["device"] is None:
        raise UsageError(
            "A device is missing.", f"Give --device: {', '.join(load_devices(a['devices_file']))}."
        )
    device = find_device(a["device"], a["devices_file"])
    cluster = Cluster(device, a["num_devices"], a["devices_per_node"])
    slos = parse_slos(a["slo"] or [])
    kind = a["objective"] or "goodput"
    if kind not in OBJECTIVES:
        raise UsageError(f"The objective {kind!r} is unknown.", f"Known: {', '.join(OBJECTIVES)}.")
    find = need_price if kind == "cost" else price_of
    objective = Objective(kind, slos, find(device.name, a["price"], a["prices"]))
    workload = read_workload(a)
    ir = read_model(a["model"])
    max_len = a["max_model_len"] or workload.max_len
    if workload.max_len > max_len:
        raise UsageError(
            f"The workload's longest request has {workload.max_len} tokens, more than --max-model-len {max_len}."
        )
    if max_len > ir.max_positions:
        raise InfeasibleError(
            f"The longest sequence has {max_len} tokens, and {a['model']} takes {ir.max_positions}.",
            "Use shorter requests or another model.",
        )
    tables = Tables.load(a["tables"]) if a["tables"] else load_pack(device)
    profile, calibrated = engine_for(device.name, a["engine"])
    tier = tier_of(device, tables, a["tables"] is not None, calibrated)
    default_seqs = sorted({profile.max_seqs, min(64, profile.max_seqs)})
    caching = a["enable_prefix_caching"]
    options = SpaceOptions(
        engine=profile,
        max_len=max_len,
        dtypes=_choices("--dtype", a["dtype"], [native(ir)], WEIGHT_BYTES),
        kv_dtypes=_choices("--kv-dtype", a["kv_dtype"], ["bf16"], KV_BYTES),
        budgets=tuple(a["budget"] or sorted({min(2048, profile.budget), profile.budget})),
        max_seqs=tuple(a["max_num_seqs"] or default_seqs),
        prefix_caching=workload.shares_prefixes if caching is None else caching,
        fewer=a["fewer_devices"],
        any_plan=a["any_plan"],
    )
    if min(*options.budgets, *options.max_seqs) < 1:
        raise UsageError("Budgets and sequence limits must be at least 1.")
    for flag, value in (
        ("--processes", a["processes"]),
        ("--top", a["top"]),
        ("--max-model-len", a["max_model_len"]),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, not {value}.")
    make_router(a["router"] or "round-robin")  # a wrong name is told before anything is simulated
    return Problem(a["model"], ir, cluster, tables, tier, workload, objective, options)


def native(ir: ModelIR) -> str:
    return "fp8_block" if ir.native == "fp8" else ir.native


def _choices(
    flag: str, given: list[str] | None, default: list[str], known: Mapping[str, object]
) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(part for text in given or default for part in text.split(",")))
    for name in chosen:
        if name not in known:
            raise UsageError(f"{flag} cannot be {name!r}.", f"Known: {', '.join(known)}.")
    return chosen


def read_workload(a: Arguments) -> Workload:
    fixed = a["input_len"], a["output_len"]
    if (fixed[0] is None) != (fixed[1] is None):
        raise UsageError("--input-len and --output-len go together.")
    sources = [a["workload"], a["trace"], fixed[0]]
    if sum(s is not None for s in sources) > 1:
        raise UsageError("--workload, --trace and --input-len exclude each other.")
    name = a["workload"] or (None if a["trace"] or fixed[0] else "chat")
    rate = a["request_rate"]
    if rate is None and a["max_concurrency"] is None and a["trace"] is None:
        rate = 4.0
    return make_workload(
        name,
        a["num_prompts"],
        trace=a["trace"],
        trace_format=a["trace_format"],
        lengths=fixed if fixed[0] is not None else None,
        request_rate=rate,
        burstiness=a["burstiness"],
        concurrency=a["max_concurrency"],
        seed=a["seed"],
    )


def read_model(model: str) -> ModelIR:
    """From the catalogue, a file or directory, or else the hub."""
    from pathlib import Path

    if published(model) is None and not Path(model).expanduser().exists() and model.count("/") == 1:
        return read_ir(_hub_config(model), model)
    return read_ir(read_config(model), model)


def _hub_config(model: str) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from llmtool.errors import ModelError

    try:
        return read_config(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise ModelError(
            f"Cannot get the config.json of {model}: {str(e).splitlines()[0] if str(e) else type(e).__name__}.",
            f"Give a file, or a name of the catalogue: {', '.join(names())}.",
        ) from None


def nothing_fits(problem: Problem, space: Space) -> InfeasibleError:
    cluster = problem.cluster
    count = smallest_cluster(problem.ir, cluster, problem.options)
    reasons = "; ".join(f"{r} ({n} plans, as {space.examples[r]})" for r, n in space.rejected.most_common(2))
    remedy = (
        f"The smallest cluster that holds it is {count} x {cluster.device.name}; narrow weights need less."
        if count
        else "Narrow the weights with --dtype, or take devices with more memory."
    )
    return InfeasibleError(
        f"{problem.model} fits in no plan on {cluster.num_devices} x {cluster.device.name}: {reasons}.",
        remedy,
    )


# -- after the search --------------------------------------------------------------------------------------------


def simulate_again(problem: Problem, d: Deployment, a: Arguments, record: bool = False) -> SimResult:
    ops = Ops(problem.cluster.device, problem.tables)
    return simulate(d, problem.cluster, ops, problem.workload, router=a["router"], record=record)


def launch_lines(problem: Problem, d: Deployment, a: Arguments) -> dict[str, Any]:
    trace = None
    if a["trace"]:
        trace = (a["trace_format"] or guess_format(a["trace"]), a["trace"])
    if a["output_file"]:
        trace = ("lengths", trace_path(a["output_file"]))
    name = hub_name(problem.model)
    lines: dict[str, Any] = {
        "vllm": vllm_lines(name, d, problem.cluster.per_node),
        "sglang": sglang_lines(name, d, problem.cluster.per_node),
        "bench": bench_line(problem.workload, problem.objective.slos, trace),
    }
    if a["output_file"] and not why_no_engine(d.plan):
        lines["llmtool"] = llmtool_line(a["output_file"])
    return lines


def trace_path(plan_path: str) -> str:
    """Where the simulated requests are written beside a plan."""
    return f"{plan_path.removesuffix('.toml')}.trace.csv"


def what_if(problem: Problem, best: Outcome, a: Arguments) -> list[dict[str, Any]]:
    base = Scenario("the plan", best.deployment, problem.cluster, problem.workload)
    answers = []
    for question in a["what_if"]:
        s = ask(question, base, lambda name: find_device(name, a["devices_file"]), read_model)
        device = s.cluster.device
        same = device == problem.cluster.device
        ops = Ops(device, problem.tables if same else load_pack(device))
        # Another device has constants and a price of its own, or none that is known.
        engine = s.deployment.engine if same else engine_for(device.name, a["engine"])[0]
        price = problem.objective.price if same else price_of(device.name, None, a["prices"])
        answer: dict[str, Any] = {"question": question}
        try:
            deployment = replace(s.deployment, engine=engine)
            result = simulate(deployment, s.cluster, ops, s.workload, router=a["router"])
        except InfeasibleError as error:
            answer["infeasible"] = error.message
        else:
            answer |= figures(result, replace(problem.objective, price=price))
        answers.append(answer)
    return answers


def find_capacity(problem: Problem, d: Deployment, a: Arguments) -> dict[str, Any]:
    ops = Ops(problem.cluster.device, problem.tables)
    found = capacity(
        lambda w: simulate(d, problem.cluster, ops, w, router=a["router"]),
        problem.workload,
        problem.objective.slos,
    )
    unit = "clients" if problem.workload.concurrency else "requests/s"
    if found is None:
        return {"held": None, "unit": unit}
    upper = found.next_rate if found.next_rate != float("inf") else None
    return {"held": found.rate, "fails_at": upper, "unit": unit, **figures(found.result, problem.objective)}


def disaggregated(problem: Problem, a: Arguments, output: Output) -> list[dict[str, Any]]:
    from llmtool.plan.disaggregate import best_split

    with output.progress() as progress:
        return best_split(
            problem.ir,
            problem.cluster,
            problem.tables,
            problem.options,
            problem.workload,
            problem.objective,
            progress,
        )


def write_files(problem: Problem, result: SearchResult, document: dict[str, Any], a: Arguments) -> None:
    best = result.best
    if a["output_file"]:
        keys = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms", "output_throughput",
                "request_throughput")  # fmt: skip
        d, figures_, split = best.deployment, best.figures, ""
        if row := better_split(document.get("disaggregated", ()), best.meets, best.loss):
            prefill, decode = row["engines"]
            d = replace(
                d,
                plan=ParallelPlan(dp=prefill + decode),
                budget=row["max_num_batched_tokens"],
                max_seqs=row["max_num_seqs"],
            )
            figures_, split = row, f"{prefill}:{decode}"
        write_plan(
            a["output_file"],
            problem.model,
            problem.cluster.device.name,
            d,
            {k: figures_[k] for k in keys},
            problem.tier.band,
            split,
        )
        write_trace(problem.workload, trace_path(a["output_file"]))
    if a["perfetto"] or a["html"]:
        recorded = simulate_again(problem, best.deployment, a, record=True)
        if a["perfetto"]:
            write_perfetto(recorded, a["perfetto"])
        if a["html"]:
            from llmtool.cli.plan_html import write_html

            write_html(a["html"], problem.model, document, recorded)


# -- printing ----------------------------------------------------------------------------------------------------

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
        str(d.plan),
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


# -- other doors -------------------------------------------------------------------------------------------------


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


def import_kernel_tables(
    output: Output, directory: str, device: str | None, devices_file: str | None, path: str | None
) -> None:
    from llmtool.sim.importer import import_tables

    if device is None or path is None:
        raise UsageError("Importing tables needs --device and -o FILE.npz.")
    tables = import_tables(directory, find_device(device, devices_file))
    tables.save(path)
    output.document(
        {"path": path, "device": tables.device, "source": tables.source, "grids": list(tables.grids)}
    )
    output.line(f"{len(tables.grids)} tables of {tables.device} in {path}: {tables.source}")


def calibrate(output: Output, a: Arguments) -> None:
    from llmtool.cli.plan_calibrate import calibrate_from

    calibrate_from(output, a)
