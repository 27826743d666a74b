"""Where every byte of the card goes. The parts are whole bytes and sum to the card."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.errors import InfeasibleError
from llmtool.memprofile.setting import Setting
from llmtool.sim.memory import activation_bytes, stage_weights
from llmtool.sim.ops import WEIGHT_BYTES


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class CardLedger:
    """parts: what is there before any request, in order; arena: bytes for KV, part of none of them. The sum of all
    parts and the arena is the card."""

    card: int
    parts: tuple[Part, ...]
    arena: int


def card_ledger(s: Setting) -> CardLedger:
    """Raises InfeasibleError when weights and activations leave nothing for KV."""
    weights = round(stage_weights(s.ir, s.plan, 0, s.ir.num_layers, s.dtype))
    activations = round(activation_bytes(s.ir, s.plan, s.budget, s.max_seqs))
    captured = round(activation_bytes(s.ir, s.plan, s.captured, 0)) if s.captured else 0
    allowed = int(s.card * s.utilization)
    room = allowed - weights - activations - captured - s.reserve
    arena = room if s.arena is None else s.arena
    if room <= 0 or arena > room:
        wanted = f"{size(arena)} of KV" if room > 0 else "any KV"
        raise InfeasibleError(
            f"{s.ir.name} does not fit {size(s.card)}: weights take {size(weights)}, a step {size(activations)}, "
            f"the runtime {size(s.reserve)}, and {s.utilization:.0%} of the card is {size(allowed)}: "
            f"{wanted} cannot be had.",
            "Take --tensor-parallel-size 2, --dtype fp8 or a larger card, or lower --max-num-batched-tokens.",
        )
    parts = [
        *_weights(s, weights),
        Part("activations", activations, f"a step of {s.budget} tokens, {s.max_seqs} sequences"),
        Part("captured steps", captured, f"one arena for steps of up to {s.captured} tokens ahead of time"),
        Part("runtime", s.reserve, "context, graphs, workspaces: an estimate"),
        Part("not given", room - arena, "left by a KV memory that was asked for"),
        Part("kept back", s.card - allowed, f"1 - utilization of {s.utilization:g}"),
    ]
    return CardLedger(s.card, tuple(p for p in parts if p.bytes), arena)


def _weights(s: Setting, total: int) -> list[Part]:
    narrow = WEIGHT_BYTES[s.dtype]
    if narrow >= 2:
        return [Part(f"weights, {s.dtype}", total)]
    whole = stage_weights(s.ir, s.plan, 0, s.ir.num_layers, "bf16")
    small = round((whole - total) / (2 - narrow) * narrow)
    return [
        Part(f"weights, {s.dtype}", small),
        Part("weights, bf16", total - small, "embedding, head, norms, routers"),
    ]


def size(nbytes: float) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} B"
