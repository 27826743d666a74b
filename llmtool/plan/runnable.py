"""What an engine can run of what can be planned: some plans are sound and yet no engine has a flag for them.

From the engines' documentation: vLLM's --enable-expert-parallel spreads experts over the whole stage, and its
--data-parallel-size and SGLang's --enable-dp-attention share MLPs between attention groups for mixtures of experts
alone.
"""

from __future__ import annotations

from llmtool.sim.ir import ModelIR
from llmtool.sim.parallel import ParallelPlan

# Engines whose flags are known; of others nothing is said.
ENGINES = ("vllm", "vllm-0.6", "sglang", "trtllm", "llmtool")


def why_not_runnable(engine: str, plan: ParallelPlan, ir: ModelIR) -> str:
    """Why an engine cannot run a plan, as a sentence; "" where it can."""
    if engine not in ENGINES:
        return ""
    if plan.attention_dp > 1 and not ir.is_moe:
        return f"{engine} shares no MLP of a dense model between attention groups."
    if engine == "vllm-0.6" and (plan.attention_dp > 1 or plan.ep > 1):
        return f"{engine} has neither attention-DP nor expert parallelism."
    if engine == "vllm" and plan.ep not in (1, plan.stage):
        return f"{engine} spreads experts over all {plan.stage} devices of a stage, or cuts each of them over all."
    if engine == "llmtool" and (why := why_no_engine(plan)):
        return f"llmtool cannot run it: {why}."
    return ""


def why_no_engine(plan: ParallelPlan) -> str:
    """Why one engine of this project cannot run its share of a plan, as a clause; "" where it can."""
    if plan.attention_dp > 1:
        return f"attention has {plan.attention_dp} groups of its own, and here a stage has one"
    if plan.ep not in (1, plan.stage):
        return (
            f"experts come in {plan.ep} groups, and here in one or on each of {plan.stage} devices of a stage"
        )
    return ""
