"""ParallelPlan: how one model is spread over devices (APEX, section 3.2: model-level DP x PP x cell-level DP x TP
or EP)."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.sim.ir import Attention, ModelIR, MoE, Recurrent


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """dp engines side by side; each a pipeline of pp stages; a stage has attention_dp groups of tp devices.

    Mixers (attention) are cut over tp devices, and each of the attention_dp groups holds all of them and serves
    its own sequences. MLPs are cut over the whole stage: dense ones into tp * attention_dp parts, mixtures by
    experts into ep groups and each expert into tp * attention_dp / ep parts. layers: of each stage; empty is as
    even as can be.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    attention_dp: int = 1
    layers: tuple[int, ...] = ()

    @property
    def stage(self) -> int:
        """Devices of one stage."""
        return self.tp * self.attention_dp

    @property
    def engine(self) -> int:
        """Devices of one engine."""
        return self.stage * self.pp

    @property
    def devices(self) -> int:
        return self.engine * self.dp

    @property
    def expert_tp(self) -> int:
        return self.stage // self.ep

    def __str__(self) -> str:
        parts = [
            ("DP", self.dp),
            ("PP", self.pp),
            ("attention-DP", self.attention_dp),
            ("TP", self.tp),
            ("EP", self.ep),
        ]
        text = " ".join(f"{name}{size}" for name, size in parts if size > 1)
        uneven = len(set(self.layers)) > 1
        return (text or "one device") + (f" layers {'+'.join(map(str, self.layers))}" if uneven else "")

    def stages(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage; the first ones take what does not divide, as the last also has the head."""
        if self.layers:
            return self.layers
        base, rest = divmod(num_layers, self.pp)
        return tuple(base + (1 if i < rest else 0) for i in range(self.pp))


def why_invalid(plan: ParallelPlan, ir: ModelIR) -> str:
    """Why a plan cannot run this model at all, as a sentence; "" where it can."""
    if min(plan.tp, plan.pp, plan.dp, plan.ep, plan.attention_dp) < 1:
        return "Every degree must be at least 1."
    if plan.pp > ir.num_layers:
        return f"{ir.num_layers} layers are too few for {plan.pp} stages."
    if plan.layers and (
        sum(plan.layers) != ir.num_layers or len(plan.layers) != plan.pp or min(plan.layers) < 1
    ):
        return f"The stages' layers must be {plan.pp} positive numbers that sum to {ir.num_layers}."
    if plan.stage % plan.ep:
        return f"{plan.ep} groups of experts do not divide a stage of {plan.stage} devices."
    if plan.ep > 1 and not ir.is_moe:
        return "The model has no experts."
    for block in dict.fromkeys(ir.blocks):
        if isinstance(block.mixer, Attention):
            if block.mixer.heads % plan.tp:
                return f"{block.mixer.heads} heads do not divide over TP{plan.tp}."
            if (
                block.mixer.latent is None
                and plan.tp % block.mixer.kv_heads
                and block.mixer.kv_heads % plan.tp
            ):
                return f"{block.mixer.kv_heads} KV heads neither divide nor repeat over TP{plan.tp}."
        for mixer in block.mixers:
            if isinstance(mixer, Recurrent) and mixer.heads > 1 and mixer.heads % plan.tp:
                return f"{mixer.heads} heads of the recurrent layers do not divide over TP{plan.tp}."
        if isinstance(block.mlp, MoE):
            if block.mlp.experts % plan.ep:
                return f"{block.mlp.experts} experts do not divide over EP{plan.ep}."
            if block.mlp.inner % plan.expert_tp:
                return f"Experts of {block.mlp.inner} neurons do not divide into {plan.expert_tp} parts."
        elif block.mlp is not None and block.mlp.inner % plan.stage:
            return f"An MLP of {block.mlp.inner} neurons does not divide into {plan.stage} parts."
    return ""
