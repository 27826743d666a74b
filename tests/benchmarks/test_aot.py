"""The benchmarks of ahead-of-time execution at tiny sizes on a CPU: that all of each runs, and what it counts."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    by = {t["target"]: t for t in data["targets"]}
    assert by["synchronisations beyond the minimum"]["met"]
    assert by["every net over cuda graph"]["met"] is None  # not measured on a CPU, and not missed
    assert by["seconds to prepare a net"]["figure"] > 0
    (engine,) = data["engine"]
    assert isinstance(engine["captured_ms"], float) and isinstance(engine["eager_ms"], float)


def test_verdicts() -> None:
    """A target over several is met by all of them, and one that was not measured is neither met nor missed."""
    sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
    try:
        targets = importlib.import_module("targets")
    finally:
        sys.path.pop(0)

    def net(name: str, graph: float) -> dict[str, Any]:
        made = {"synchronisations": 3, "arena_bytes": 10, "no_reuse_bytes": 100}
        plan = {"assignments": {"ours": made, "paper": made}, "prepare_seconds": 0.4,
                "measured_seconds": {"serial": 3e-3, "gated": 2e-3, "full": 2.5e-3, "eager": 1.0}}  # fmt: skip
        return {"net": name, "aot_ms": 2.0, "over_cuda graph": graph, "over_eager": 4.0, "plan": plan}

    nets = [net("bert", 1.2), net("nasnet", 0.97)]
    found = {t["target"]: t for t in targets.of_nets(nets, [{"net": "resnet", "ratio": 1.5}], [])}
    assert (found["every net over cuda graph"]["figure"], found["every net over cuda graph"]["met"]) == (
        0.97,
        False,
    )
    assert found["bert over eager"]["met"] and not found["nasnet over eager"]["met"]
    assert found["nasnet, several streams over one"]["figure"] == 1.5
    assert found["inception, several streams over one"]["met"] is None
    assert (
        found["arena over no reuse"]["met"] and found["training resnet over eager; the paper has 1.9x"]["met"]
    )
    assert found["seconds to capture a bucket"]["met"] is None
    rows = [{"case": case, "us": us, "kv_mb": mb, "of_copy": part} for case, us, mb, part in (
        ("32 x 4096, pages of 16", 100.0, 537.0, 0.93), ("32 x 4096, 2 queries", 110.0, 537.0, 0.9),
        ("32 x 4096, stride 3", 110.0, 537.0, 0.9), ("1 x 65536 + 31 x 512", 72.0, 333.0, 0.8),
        ("1 x 1024, pages of 16", 9.0, 4.0, 0.1))]  # fmt: skip
    found = {t["target"]: t["met"] for t in targets.of_attention(rows)}
    assert found["2 queries over one"] and not found["pages 3 times as far apart over contiguous"]
    assert found["one long and 31 short over ideal"] and found["decode, one sequence of 1,024: us"]
    assert found["decode, 64 to 256 MB of KV: part of a copy"] is None and found["8 queries over one"] is None


def test_task_graphs_of_the_table() -> None:
    shown = run(ROOT / "benchmarks/aot_graphs.py", "--tiny")
    assert all(name in shown for name in ("bert", "decoder", "moe", "inception", "nasnet"))


def test_cpu_benchmark() -> None:
    assert "bare" in run(ROOT / "benchmarks/aot_cpu.py", "--quick", "--threads", "1")
