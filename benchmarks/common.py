"""What every benchmark writes beside its figures: machine and versions."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    from llmtool.bench.environment import hardware

    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "llmtool")}
    return {"date": datetime.now(UTC).date().isoformat(), "python": platform.python_version(), **packages} | {
        "hardware": hardware(None)
    }


def save(name: str, data: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**data, "machine": machine()}, indent=1) + "\n")
    sys.stderr.write(f"wrote {path}\n")
