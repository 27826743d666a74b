"""What an engine adds to its kernels, and how it schedules by default.

Constants are fitted by benchmarks/plan/accuracy.py on the runs named there; `plan --calibrate` fits a user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """host_step, host_seq: seconds of the host per step and per sequence in it that kernels do not hide. compute,
    memory, network: factors on the times of kernels bound by each, and of collectives. request: seconds from a
    client's sending to the scheduler, and back. budget, max_seqs: defaults of a step. reserve: bytes of a device beside weights, KV and
    activations. source: what the constants were fitted on.
    """

    name: str
    host_step: float
    host_seq: float = 0.0
    compute: float = 1.0
    memory: float = 1.0
    network: float = 1.0
    request: float = 0.0
    budget: int = 8192
    max_seqs: int = 256
    utilization: float = 0.9
    reserve: int = 640 * 2**20
    source: str = ""


ENGINES: Mapping[str, EngineProfile] = {
    "llmtool": EngineProfile("llmtool", 2e-3, 2e-5, budget=512, max_seqs=64, source="assumed"),
    "vllm": EngineProfile("vllm", 1.0e-3, 1e-5, request=15e-3, budget=8192, max_seqs=256, source="assumed"),
    "vllm-0.6": EngineProfile("vllm-0.6", 5e-3, 1e-5, request=5e-3, budget=512, max_seqs=256, source="assumed"),
    "sglang": EngineProfile("sglang", 1.0e-3, 1e-5, request=15e-3, budget=8192, max_seqs=256, source="assumed"),
    "trtllm": EngineProfile("trtllm", 0.5e-3, 1e-5, request=15e-3, budget=8192, max_seqs=256, source="assumed"),
}


def find_engine(name: str) -> EngineProfile:
    if name not in ENGINES:
        raise UsageError(f"The engine {name!r} is unknown.", f"Known: {', '.join(ENGINES)}.")
    return ENGINES[name]
