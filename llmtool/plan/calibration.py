"""Constants that a user's own runs were fitted to: one table per device and engine, used before the built-in
ones."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtool.errors import LLMToolError, UsageError
from llmtool.plan.fit import Observation, figure, fit_engine
from llmtool.sim.engines import FITTED, EngineProfile, find_engine

_FILE = "calibration.toml"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """profile: with the fitted constants. errors: (figure, measured, predicted before, predicted after)."""

    profile: EngineProfile
    errors: tuple[tuple[str, float, float, float], ...]

    @property
    def residual(self) -> float:
        """The largest relative error left on the runs that were fitted."""
        return max(abs(after / measured - 1) for _, measured, _, after in self.errors)


def calibrate(base: EngineProfile, observations: Sequence[Observation], freedom: float) -> Calibrated:
    """Fit `base` to measured runs. freedom: how much wider than its own the priors of kernels are: 1 with
    efficiencies measured on this device, more without."""
    profile = fit_engine(base, observations, evaluations=16, freedom=freedom)
    errors = []
    for o in observations:
        before, after = o.simulate(base), o.simulate(profile)
        for name, value in o.measured.items():
            errors.append((name, value, figure(before, name), figure(after, name)))
    return Calibrated(profile, tuple(errors))


def path() -> Path:
    """Where calibrations are kept: $LLMTOOL_CACHE, else ~/.cache/llmtool. Raises UsageError without either."""
    try:
        return Path(os.environ.get("LLMTOOL_CACHE") or "~/.cache/llmtool").expanduser() / _FILE
    except RuntimeError:
        raise UsageError(
            "There is no home directory to keep calibrations in.", "Set LLMTOOL_CACHE to a directory."
        ) from None


def engine_for(device: str, name: str, file: Path | None = None) -> tuple[EngineProfile, bool]:
    """The profile of an engine on a device, and whether it was calibrated there."""
    profile = find_engine(name, device)
    table = _read(file or path()).get(f"{device}/{name}")
    if table is None:
        return profile, False
    values: dict[str, Any] = {k: float(v) for k, v in table.items() if k in FITTED}
    return replace(profile, **values, source=str(table.get("source", "calibrated"))), True


def store(device: str, profile: EngineProfile, source: str, file: Path | None = None) -> Path:
    """Keep a calibration; it replaces the one of the same device and engine."""
    target = file or path()
    tables = _read(target)
    constants: dict[str, Any] = {name: getattr(profile, name) for name in FITTED}
    tables[f"{device}/{profile.name}"] = {**constants, "source": source}
    lines = []
    for name, table in tables.items():
        lines.append(f"[{json.dumps(name)}]")
        for key, value in table.items():
            lines.append(
                f"{key} = {json.dumps(value)}" if isinstance(value, str) else f"{key} = {float(value):.6e}"
            )
        lines.append("")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines), encoding="utf-8")
    except OSError as e:
        raise LLMToolError(f"Cannot write the calibration {target}: {e.strerror or e}.") from None
    return target


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with file.open("rb") as f:
            return tomllib.load(f)
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(
            f"The calibration file {file} cannot be read: {e}.", "Remove it, or mend it."
        ) from None
