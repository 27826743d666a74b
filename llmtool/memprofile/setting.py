"""What is profiled: a model on a card, with the settings that decide where bytes go."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.core.memory.model import ModelGeometry
from llmtool.errors import UsageError
from llmtool.sim.engines import find_engine
from llmtool.sim.ir import ModelIR
from llmtool.sim.memory import geometry
from llmtool.sim.ops import KV_BYTES, WEIGHT_BYTES
from llmtool.sim.parallel import ParallelPlan, why_invalid

RESERVE = find_engine("llmtool").reserve


@dataclass(frozen=True, slots=True)
class Setting:
    """card: bytes of one device. dtype: of the weights, kv_dtype: of the KV (sim.ops). utilization: part of the
    card that the engine may take. budget: tokens of a step; max_seqs: sequences that run at once. max_len: longest
    sequence. page: tokens per page. checkpoint: tokens between checkpoints of states in cached prefixes. reserve:
    bytes for the device's context, graphs and workspaces. image: image tokens of a request, where layers attend to
    them. arena: bytes of KV memory, where they are given and not what the rest leaves. captured: tokens of the
    largest step that is captured ahead of time; their buffers, all in one arena, are there beside a step's.

    Raises UsageError for values that make no sense.
    """

    ir: ModelIR
    card: int
    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    tp: int = 1
    utilization: float = 0.9
    budget: int = 8192
    max_seqs: int = 256
    max_len: int = 8192
    page: int = 16
    checkpoint: int = 512
    reserve: int = RESERVE
    image: int = 0
    arena: int | None = None
    captured: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, WEIGHT_BYTES),
            ("kv_dtype", self.kv_dtype, KV_BYTES),
        ):
            if value not in known:
                raise UsageError(f"The {name} {value!r} is not known.", f"Known: {', '.join(known)}.")
        if not 0 < self.utilization <= 1:
            raise UsageError(f"The utilization must be above 0 and at most 1, not {self.utilization:g}.")
        counts = (self.card, self.tp, self.budget, self.max_seqs, self.max_len, self.page, self.checkpoint)
        if min(counts) < 1 or self.image < 0:
            raise UsageError("Memory, degrees, lengths and counts must be at least 1.")
        wrong = why_invalid(self.plan, self.ir)
        if wrong:
            raise UsageError(wrong, "Choose another --tensor-parallel-size.")
        if self.max_len > self.ir.max_positions:
            raise UsageError(
                f"max_model_len is {self.max_len}, but {self.ir.name} was made for {self.ir.max_positions} tokens.",
                f"Set --max-model-len to {self.ir.max_positions} or less.",
            )

    @property
    def plan(self) -> ParallelPlan:
        return ParallelPlan(tp=self.tp)

    @property
    def geometry(self) -> ModelGeometry:
        return geometry(self.ir, self.tp, self.kv_dtype)
