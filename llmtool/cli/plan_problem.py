"""What `llmtool plan` is asked: flags become a problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtool.cli.output import Output
from llmtool.core.routing import make_router
from llmtool.core.speculation.build import controller_of
from llmtool.errors import InfeasibleError, UsageError
from llmtool.hardware import Cluster, find_device, load_devices
from llmtool.hardware.prices import need_price, price_of
from llmtool.modelspec.catalogue import names, published, read_config
from llmtool.plan.calibration import engine_for
from llmtool.plan.objective import OBJECTIVES, Objective
from llmtool.plan.space import Space, SpaceOptions, smallest_cluster
from llmtool.plan.tier import Tier, tier_of
from llmtool.plan.workloads import make_workload
from llmtool.sim.deployment import Drafting
from llmtool.sim.grid import Tables
from llmtool.sim.ir import ModelIR, read_ir
from llmtool.sim.ops import KV_BYTES, WEIGHT_BYTES, load_pack
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
        draftings=read_draftings(a),
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


def law_of(a: Arguments) -> tuple[float, float] | None:
    """Acceptance and coverage of drafts, where the first is given."""
    if a["acceptance"] is None:
        return None
    return a["acceptance"], 1.0 if a["coverage"] is None else a["coverage"]


def read_draftings(a: Arguments) -> tuple[Drafting | None, ...]:
    specs = tuple(dict.fromkeys(part for text in a["spec"] or ["off"] for part in text.split(",")))
    law = law_of(a)
    asked = any(q.startswith("speculation=") for q in a["what_if"] or [])
    if (a["acceptance"] is not None or a["coverage"] is not None) and specs == ("off",) and not asked:
        raise UsageError("--acceptance and --coverage go with speculation.", "Add --spec off,auto or so.")
    if law is not None:
        Drafting("auto", *law)  # chances that are none are told before anything is simulated
    kinds: list[Drafting | None] = []
    for spec in specs:
        if controller_of(spec) is None:
            kinds.append(None)
        elif law is None:
            raise UsageError(
                f"--spec {spec} needs to know how often drafts are right.",
                "Give --acceptance, as `llmtool bench --spec` measures it.",
            )
        else:
            kinds.append(Drafting(spec, *law))
    return tuple(dict.fromkeys(kinds))


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
