"""The loop closed on the machine at hand: predict our own server, bench it once, calibrate, predict other loads.

python benchmarks/plan/loop.py [--model smollm2-135m] [--rounds 3] [--keep DIR]

A server of the model is started; `llmtool plan` writes its plan for the device `cpu`; `llmtool bench` runs one load
of bursts and lulls and of many lengths, so that few and many sequences, short and long prompts are in it;
`llmtool plan --calibrate` fits the constants to that one result; then three other loads are predicted before they
are benched. Every load is benched `rounds` times, interleaved, and compared by medians. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import save

PORT = 8931
CALIBRATE = [
    "--num-prompts", "64", "--random-input-len", "192", "--random-output-len", "64", "--random-range-ratio", "0.6",
    "--request-rate", "1.1", "--burstiness", "0.4",
]  # fmt: skip
# (input tokens, output tokens, clients, requests)
PREDICT = {
    "longer prompts": (320, 48, 4, 40),
    "one client": (128, 64, 1, 16),
    "more clients": (96, 96, 8, 64),
}


def llmtool(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llmtool", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def closed(load: tuple[int, int, int, int]) -> list[str]:
    input_len, output_len, clients, count = map(str, load)
    return ["--random-input-len", input_len, "--random-output-len", output_len, "--max-concurrency", clients,
            "--num-prompts", count]  # fmt: skip


def bench(load: list[str], path: Path) -> dict[str, float]:
    llmtool("bench", "--url", f"http://127.0.0.1:{PORT}", "--dataset-name", "random", *load, "--ignore-eos", "-o",
            str(path), "-q")  # fmt: skip
    data = json.loads(path.read_text())
    return {
        "ttft": data["mean_ttft_ms"],
        "tpot": data["mean_tpot_ms"],
        "throughput": data["output_throughput"],
    }


def predict(
    model: str, load: tuple[int, int, int, int], budget: int, seqs: int, dtype: str, cache: str
) -> dict[str, float]:
    input_len, output_len, clients, count = map(str, load)
    text = llmtool(
        "plan", model, "--device", "cpu", "--num-devices", "1", "--engine", "llmtool", "--input-len", input_len,
        "--output-len", output_len, "--max-concurrency", clients, "--num-prompts", count, "--dtype", dtype,
        "--kv-dtype", dtype, "--max-num-batched-tokens", str(budget), "--max-num-seqs", str(seqs),
        "--max-model-len", "1024", "-o", f"{cache}/plan.toml", "--json", "-q", LLMTOOL_CACHE=cache,
    )  # fmt: skip
    best = json.loads(text)["plans"][0]
    return {
        "ttft": best["mean_ttft_ms"],
        "tpot": best["mean_tpot_ms"],
        "throughput": best["output_throughput"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=None, help="copy the bench results here")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    args = parser.parse_args()
    budget, seqs = 512, 64
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        before = {n: predict(args.model, p, budget, seqs, args.dtype, folder) for n, p in PREDICT.items()}
        server = subprocess.Popen(
            [sys.executable, "-m", "llmtool", "serve", args.model, "--port", str(PORT), "--max-model-len", "1024",
             "--max-num-batched-tokens", str(budget), "--max-num-seqs", str(seqs), "--no-enable-prefix-caching",
             "--dtype", {"bf16": "bfloat16", "fp32": "float32"}[args.dtype], "--log-level", "error"]
        )  # fmt: skip
        try:
            wait_until_ready()
            bench(closed((64, 16, 4, 16)), base / "warm.json")
            first = bench(CALIBRATE, base / "first.json")
            llmtool("plan", "--calibrate", str(base / "first.json"), "--plan", f"{folder}/plan.toml", "-q",
                    LLMTOOL_CACHE=folder)  # fmt: skip
            rows: dict[str, Any] = {}
            for name, load in PREDICT.items():
                rows[name] = {
                    "predicted": predict(args.model, load, budget, seqs, args.dtype, folder),
                    "runs": [],
                }
            for i in range(args.rounds):
                for name, load in PREDICT.items():
                    rows[name]["runs"].append(bench(closed(load), base / f"{name} {i}.json"))
        finally:
            server.terminate()
            server.wait(30)
            if args.keep:
                shutil.copytree(folder, args.keep, dirs_exist_ok=True)
    for row in rows.values():
        row["measured"] = {k: statistics.median(r[k] for r in row["runs"]) for k in row["predicted"]}
        row["errors"] = {k: round(row["predicted"][k] / v - 1, 4) for k, v in row["measured"].items()}
    report = {
        "model": args.model,
        "calibration_run": first,
        "predicted_before_calibration": before,
        "loads": rows,
    }
    print(json.dumps(report, indent=1))
    save("loop", report)


def wait_until_ready() -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=1) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("The server did not come up.")


if __name__ == "__main__":
    main()
