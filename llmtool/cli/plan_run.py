"""The body of `llmtool plan`: a problem becomes a search, its answers and files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import typer

from llmtool.cli.output import Output
from llmtool.cli.plan_problem import Arguments, Problem, law_of, nothing_fits, read_model, read_problem
from llmtool.cli.plan_show import show
from llmtool.errors import InfeasibleError, UsageError
from llmtool.hardware import find_device
from llmtool.hardware.prices import price_of
from llmtool.modelspec.catalogue import hub_name
from llmtool.plan import report
from llmtool.plan.calibration import engine_for
from llmtool.plan.capacity import capacity
from llmtool.plan.disaggregate import better_split
from llmtool.plan.launch import bench_line, llmtool_line, sglang_lines, vllm_lines
from llmtool.plan.objective import figures
from llmtool.plan.perfetto import write_perfetto
from llmtool.plan.planfile import write_plan
from llmtool.plan.runnable import why_no_engine
from llmtool.plan.search import Outcome, SearchResult, search
from llmtool.plan.space import build_space, heuristic_plan
from llmtool.plan.whatif import Scenario, ask
from llmtool.plan.workloads import guess_format, write_trace
from llmtool.sim.deployment import Deployment
from llmtool.sim.ops import Ops, load_pack
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.simulate import SimResult, simulate


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
    base = Scenario("the plan", best.deployment, problem.cluster, problem.workload, law_of(a))
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
                drafting=None,
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
