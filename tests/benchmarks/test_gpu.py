"""The GPU benchmarks' whole flow at tiny sizes on a CPU, peers included."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/gpu/run_all.py", "--dry-run", "--out", tmp_path]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, capture_output=True, env={**env, "CUDA_VISIBLE_DEVICES": ""})
    attention = json.loads((tmp_path / "attention.json").read_text())
    assert attention["dry_run"] and not attention["left_out"]
    assert len(attention["rows"]) == 5
    for row in attention["rows"]:
        assert row["us"] > 0 and row["of_copy"] > 0
        if "200" not in row["case"]:  # lengths differ: nothing to compare with
            assert row["error"] < 0.01
            assert row["sdpa_us"] > 0
    assert sum(isinstance(row["flex_us"], float) for row in attention["rows"]) == 2
    decode = json.loads((tmp_path / "decode.json").read_text())
    (row,) = decode["rows"]
    for what in ("graph_ms", "engine_ms", "generate_ms", "continuous_ms"):
        assert isinstance(row[what], float), row[what]
    assert decode["machine"]["torch"] and not decode["left_out"]
