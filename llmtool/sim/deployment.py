"""Deployment: a model, a parallel plan and an engine's settings; all that a simulation is of, but for devices."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.sim.engines import EngineProfile
from llmtool.sim.ir import ModelIR
from llmtool.sim.parallel import ParallelPlan


@dataclass(frozen=True, slots=True)
class Deployment:
    """dtype: of the weights (ops.WEIGHT_BYTES), kv_dtype: bf16 | fp8. budget: tokens of a step. max_seqs: sequences
    that run at once, of each attention group. max_len: longest sequence. block_size: tokens per KV page."""

    ir: ModelIR
    plan: ParallelPlan
    engine: EngineProfile
    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    budget: int = 8192
    max_seqs: int = 256
    max_len: int = 8192
    block_size: int = 16
    prefix_caching: bool = False
