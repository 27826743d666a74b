"""The benchmarks of ahead-of-time execution at tiny sizes on a CPU: that all of each runs, and what it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: object) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gpu_script_in_a_dry_run(tmp_path: Path) -> None:
    run(ROOT / "benchmarks/aot_h200.py", "--dry-run", "--out", tmp_path)
    data = json.loads((tmp_path / "aot.json").read_text())
    assert data["dry_run"] and not data["left_out"]
    assert [net["net"] for net in data["nets"]] == ["mlp", "inception"]
    for net in data["nets"]:
        assert not net["failed"]
        assert net["ms"]["aot"] > 0
        made = net["plan"]["assignments"]
        assert made["ours"]["synchronisations"] <= made["code"]["synchronisations"]
    assert [step["net"] for step in data["training"]] == ["resnet", "mobilenet", "efficientnet"]
    for step in data["training"]:
        assert step["aot_ms"] > 0 and step["schedule"] == "serial"
    (engine,) = data["engine"]
    assert isinstance(engine["captured_ms"], float) and isinstance(engine["eager_ms"], float)


def test_task_graphs_of_the_table() -> None:
    shown = run(ROOT / "benchmarks/aot_graphs.py", "--tiny")
    assert all(name in shown for name in ("bert", "decoder", "moe", "inception", "nasnet"))


def test_cpu_benchmark() -> None:
    assert "bare" in run(ROOT / "benchmarks/aot_cpu.py", "--quick", "--threads", "1")
