"""What an engine adds to its kernels, and how it schedules by default.

Constants are fitted by benchmarks/plan/accuracy.py on the runs named there; `plan --calibrate` fits a user's own.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from llmtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """host_step, host_seq: seconds of the host per step and per sequence in it that kernels do not hide. compute,
    memory, network: factors on the times of kernels bound by each, and of collectives; attention: one more on
    that of prompts. request: seconds from a
    client's sending to the scheduler, and back. budget, max_seqs: defaults of a step. reserve: bytes of a device
    beside weights, KV and activations. router: between its replicas. source: what the constants were fitted on.
    """

    name: str
    host_step: float
    host_seq: float = 0.0
    compute: float = 1.0
    memory: float = 1.0
    network: float = 1.0
    attention: float = 1.0
    request: float = 0.0
    budget: int = 8192
    max_seqs: int = 256
    utilization: float = 0.9
    reserve: int = 640 * 2**20
    router: str = "round-robin"
    source: str = ""


FITTED = ("host_step", "host_seq", "compute", "memory", "network", "attention", "request")


def load_engines() -> dict[str, EngineProfile]:
    """The built-in profiles by name; NAME@DEVICE are those of one device."""
    tables = tomllib.loads((files("llmtool.sim") / "engines.toml").read_text(encoding="utf-8"))
    return {name: EngineProfile(name.split("@")[0], **table) for name, table in tables.items()}


def find_engine(name: str, device: str = "") -> EngineProfile:
    """The profile of an engine, on a device where it was fitted there. Raises UsageError for an unknown engine."""
    engines = load_engines()
    if name not in engines or "@" in name:
        known = ", ".join(n for n in engines if "@" not in n)
        raise UsageError(f"The engine {name!r} is unknown.", f"Known: {known}.")
    return engines.get(f"{name}@{device}", engines[name])
