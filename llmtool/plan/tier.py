"""How far a prediction can be trusted: where its kernel times come from, and the error measured for that source."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.hardware import DeviceSpec
from llmtool.sim.grid import Tables


@dataclass(frozen=True, slots=True)
class Tier:
    """band: relative error of TPOT and throughput to expect (means over runs of benchmarks/plan/accuracy.py where
    that device was measured; a judgement where none was)."""

    name: str
    band: float
    source: str


def tier_of(device: DeviceSpec, tables: Tables | None, imported: bool, calibrated: bool) -> Tier:
    source = tables.source if tables is not None else "data-sheet peaks"
    if calibrated:
        return Tier("calibrated", 0.10, f"constants fitted to your runs; {source}")
    if imported:
        return Tier("measured tables", 0.10, source)
    if tables is None:
        return Tier("roofline", 0.50, source)
    if not device.measured:
        return Tier("borrowed efficiencies", 0.30, f"measured on {tables.device}: {source}")
    return Tier("measured efficiencies", 0.15, source)
