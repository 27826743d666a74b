"""plan.toml: a chosen plan as a file, settings of `serve` at the top, what was planned and predicted below them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtool.errors import LLMToolError, UsageError
from llmtool.plan.runnable import why_no_engine
from llmtool.sim.deployment import Deployment, Drafting
from llmtool.sim.parallel import ParallelPlan

VERSION = 1
_SERVE_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class PlanFile:
    """settings: of EngineConfig. plan: degrees. device, engine, dtype, kv_dtype, model: what it was planned for.
    disaggregate: PREFILL:DECODE engines that the plan's dp are made of, "" where they do both."""

    settings: Mapping[str, Any]
    plan: ParallelPlan
    model: str
    device: str
    engine: str
    dtype: str
    kv_dtype: str
    prediction: Mapping[str, Any]
    disaggregate: str = ""
    drafting: Drafting | None = None


def write_plan(
    path: str | Path,
    model: str,
    device: str,
    d: Deployment,
    prediction: Mapping[str, float],
    error_band: float,
    disaggregate: str = "",
) -> None:
    """disaggregate: as of PlanFile. Raises LLMToolError where the file cannot be written."""
    settings: dict[str, Any] = {
        "model": model,
        "max_model_len": d.max_len,
        "max_num_seqs": d.max_seqs,
        "max_num_batched_tokens": d.budget,
        "block_size": d.block_size,
        "enable_prefix_caching": d.prefix_caching,
        "gpu_memory_utilization": d.engine.utilization,
    }
    if d.dtype in _SERVE_DTYPES:
        settings["dtype"] = _SERVE_DTYPES[d.dtype]
    if d.drafting is not None:
        settings["spec"] = d.drafting.spec
    p = d.plan
    plan: dict[str, Any] = {
        "version": VERSION,
        "device": device,
        "engine": d.engine.name,
        "weights": d.dtype,
        "kv_cache": d.kv_dtype,
        "tensor_parallel": p.tp,
        "pipeline_parallel": p.pp,
        "data_parallel": p.dp,
        "expert_parallel": p.ep,
        "attention_data_parallel": p.attention_dp,
        "layers": list(p.layers),
    }
    if d.drafting is not None:
        plan |= {"draft_acceptance": d.drafting.acceptance, "draft_coverage": d.drafting.coverage}
    if disaggregate:
        plan["disaggregate"] = disaggregate
    figures = {k: float(f"{v:.6g}") for k, v in prediction.items() if isinstance(v, int | float)}
    lines = [f"{k} = {_toml(v)}" for k, v in settings.items()]
    lines += ["", "[plan]", *(f"{k} = {_toml(v)}" for k, v in plan.items())]
    lines += [
        "",
        "[prediction]",
        f"error_band = {error_band}",
        *(f"{k} = {_toml(v)}" for k, v in figures.items()),
    ]
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as e:
        raise LLMToolError(f"Cannot write the plan {path}: {e.strerror or e}.") from None


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)


def read_plan(path: str | Path) -> PlanFile:
    """Raises UsageError for a file that is none."""
    try:
        with Path(path).open("rb") as file:
            data = tomllib.load(file)
    except OSError as e:
        raise UsageError(f"Cannot read the plan {path}: {e.strerror or e}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"The plan {path} is not valid TOML: {e}.") from None
    table = data.get("plan")
    if not isinstance(table, dict) or table.get("version") != VERSION:
        raise UsageError(
            f"{path} is no plan of version {VERSION}.", "Write one with `llmtool plan ... -o plan.toml`."
        )
    try:
        plan = ParallelPlan(
            tp=int(table["tensor_parallel"]),
            pp=int(table["pipeline_parallel"]),
            dp=int(table["data_parallel"]),
            ep=int(table["expert_parallel"]),
            attention_dp=int(table["attention_data_parallel"]),
            layers=tuple(int(n) for n in table.get("layers", ())),
        )
        return PlanFile(
            settings={k: v for k, v in data.items() if not isinstance(v, dict)},
            plan=plan,
            model=str(data["model"]),
            device=str(table["device"]),
            engine=str(table["engine"]),
            dtype=str(table["weights"]),
            kv_dtype=str(table["kv_cache"]),
            prediction=data.get("prediction", {}),
            disaggregate=str(table.get("disaggregate", "")),
            drafting=_drafting(data, table),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"The plan {path} lacks or garbles {e}.") from None


def _drafting(data: Mapping[str, Any], table: Mapping[str, Any]) -> Drafting | None:
    if "draft_acceptance" not in table:
        return None
    return Drafting(
        str(data["spec"]), float(table["draft_acceptance"]), float(table.get("draft_coverage", 1.0))
    )


def serve_settings(path: str | Path) -> dict[str, Any]:
    """The settings with which `serve` runs a plan: processes for the ranks of its engines, engines behind a router.
    Raises UsageError for a plan that this server has no way to run."""
    file = read_plan(path)
    plan = file.plan
    why = why_no_engine(plan)
    if why:
        raise UsageError(
            f"The plan {path} ({plan}) is not for this server: {why}.",
            "Run the plan's vllm or sglang line, or plan with --engine llmtool.",
        )
    degrees: dict[str, Any] = {}
    if file.disaggregate:
        degrees["disaggregate"] = file.disaggregate
    elif plan.dp > 1:
        degrees["data_parallel_size"] = plan.dp
    if plan.engine > 1:
        degrees |= {"tensor_parallel_size": plan.tp, "pipeline_parallel_size": plan.pp}
    if plan.ep > 1:
        degrees["enable_expert_parallel"] = True
    if len(set(plan.layers)) > 1:
        degrees["pipeline_layers"] = plan.layers
    return dict(file.settings) | degrees
