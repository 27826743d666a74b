"""Where this folder's figures go: results/NAME.json, with machine and versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import machine

RESULTS = Path(__file__).parent / "results"


def save(name: str, data: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**data, "machine": machine()}, indent=1) + "\n")
    sys.stderr.write(f"wrote {path}\n")
