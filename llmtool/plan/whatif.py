"""What if: one plan under other circumstances. A question is NAME=VALUE; the answer is a simulation beside the
plan's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmtool.core.speculation.build import controller_of
from llmtool.errors import InfeasibleError, UsageError
from llmtool.hardware import Cluster, DeviceSpec
from llmtool.sim.deployment import Deployment, Drafting
from llmtool.sim.ir import ModelIR
from llmtool.sim.ops import KV_BYTES, WEIGHT_BYTES
from llmtool.sim.parallel import why_invalid
from llmtool.sim.workload import Workload

_NAMES = ("rate=FACTOR", "device=NAME", "dtype=TYPE", "kv-dtype=TYPE", "model=MODEL", "max-num-seqs=N")
QUESTIONS = ", ".join((*_NAMES, "max-num-batched-tokens=N", "speculation=SPEC"))


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated. question: as it was asked. law: acceptance and coverage of drafts, where they are
    known."""

    question: str
    deployment: Deployment
    cluster: Cluster
    workload: Workload
    law: tuple[float, float] | None = None


def ask(
    question: str,
    base: Scenario,
    find_device: Callable[[str], DeviceSpec],
    read_model: Callable[[str], ModelIR],
) -> Scenario:
    """The scenario that a question describes. Raises UsageError for what is no question, InfeasibleError for a plan
    that the other model cannot run."""
    name, _, value = question.partition("=")
    d, cluster, workload = base.deployment, base.cluster, base.workload
    if not value:
        raise UsageError(f"{question!r} is no question.", f"Ask {QUESTIONS}.")
    if name == "rate":
        workload = workload.faster(_number(question, value))
    elif name == "device":
        cluster = Cluster(find_device(value), cluster.num_devices, cluster.per_node)
    elif name == "dtype":
        d = replace(d, dtype=_choice(question, value, tuple(WEIGHT_BYTES)))
    elif name == "kv-dtype":
        d = replace(d, kv_dtype=_choice(question, value, tuple(KV_BYTES)))
    elif name == "model":
        d = replace(d, ir=read_model(value))
        why = why_invalid(d.plan, d.ir)
        if why:
            raise InfeasibleError(f"{value} cannot run under {d.plan}: {why}", "Plan for it by itself.")
    elif name == "max-num-seqs":
        seqs = round(_number(question, value))
        d = replace(d, max_seqs=seqs, budget=max(d.budget, seqs))
    elif name == "max-num-batched-tokens":
        d = replace(d, budget=max(round(_number(question, value)), d.max_seqs))
    elif name == "speculation":
        d = replace(d, drafting=_drafting(question, value, base))
    else:
        raise UsageError(f"{question!r} is no question.", f"Ask {QUESTIONS}.")
    return Scenario(question, d, cluster, workload, base.law)


def _drafting(question: str, spec: str, base: Scenario) -> Drafting | None:
    if controller_of(spec) is None:
        return None
    if base.deployment.plan.pp > 1:
        raise InfeasibleError(
            f"{question!r} asks for drafts in a pipeline: they need a step's tokens before the next begins.",
            "Ask it of a plan without pipeline stages.",
        )
    if base.law is None:
        raise UsageError(
            f"{question!r} needs to know how often drafts are right.",
            "Give --acceptance, as `llmtool bench --spec` measures it.",
        )
    return Drafting(spec, *base.law)


def _number(question: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UsageError(f"{question!r} needs a positive number.")
    return number


def _choice(question: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(f"{question!r} needs one of {', '.join(choices)}.")
    return value
