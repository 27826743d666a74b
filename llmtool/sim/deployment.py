"""Deployment: a model, a parallel plan and an engine's settings; all that a simulation is of, but for devices."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.core.request import MAX_SPEC
from llmtool.errors import UsageError
from llmtool.sim.engines import EngineProfile
from llmtool.sim.ir import ModelIR
from llmtool.sim.parallel import ParallelPlan


@dataclass(frozen=True, slots=True)
class Drafting:
    """Speculation of an engine. spec: as `serve --spec` has it, but not off. acceptance, coverage: the law of its
    drafts (drafts.py). Raises UsageError for chances outside [0, 1]."""

    spec: str
    acceptance: float
    coverage: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("acceptance", self.acceptance), ("coverage", self.coverage)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"The {name} of drafts must be between 0 and 1, not {value:g}.")

    @property
    def depth(self) -> int:
        """Draft tokens of a sequence in a step at most."""
        return min(int(self.spec), MAX_SPEC) if self.spec.isdecimal() else MAX_SPEC

    def __str__(self) -> str:
        return f"spec {self.spec}"


@dataclass(frozen=True, slots=True)
class Deployment:
    """dtype: of the weights (ops.WEIGHT_BYTES), kv_dtype: bf16 | fp8. budget: tokens of a step. max_seqs: sequences
    that run at once, of each attention group. max_len: longest sequence. block_size: tokens per KV page. drafting:
    None is without speculation."""

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
    drafting: Drafting | None = None
