#!/usr/bin/env bash
# loop.sh OUT: once round, prune → plan → serve the plan → bench it → calibrate the planner → plan again. Everything is
# kept in OUT; what is there already is not made again. Set by the environment:
#   LLMTOOL      the command ("llmtool")             MODEL        what is pruned ("smollm2-135m")
#   DEVICE       of the plan ("cpu": this machine)   DEVICES      how many ("1")
#   PRUNE_FLAGS, LOAD_FLAGS, PLAN_FLAGS              of the commands, see below
set -euo pipefail

here=$(dirname "$0")
out=$1
read -ra llmtool <<<"${LLMTOOL:-llmtool}"
model=${MODEL:-smollm2-135m}
device=${DEVICE:-cpu}
devices=${DEVICES:-1}
read -ra prune <<<"${PRUNE_FLAGS:---params 0.8 --samples 128}"
read -ra load <<<"${LOAD_FLAGS:---input-len 192 --output-len 64 --request-rate 0.7 --num-prompts 48}"
read -ra more <<<"${PLAN_FLAGS:-}"
plan=(plan "$out/pruned/model" --device "$device" --num-devices "$devices" --engine llmtool "${load[@]}" "${more[@]}")

mkdir -p "$out"
# What the planner learns here stays here: its first plan is to know nothing, and no other one is to hear of it.
planner() { LLMTOOL_CACHE=$out/cache "${llmtool[@]}" "$@"; }
step() { printf '\n== %s\n' "$1" >&2; }

if [ ! -f "$out/pruned/report.json" ]; then
  step "1. prune $model"
  rm -rf "$out/pruned"
  "${llmtool[@]}" prune "$model" "${prune[@]}" --output "$out/pruned"
fi
if [ ! -f "$out/plan.toml" ]; then
  step "2. plan it for $devices x $device"
  planner "${plan[@]}" --output "$out/plan.toml" --json -q >"$out/predicted.json"
fi
if [ ! -f "$out/measured.json" ]; then
  step "3. serve the plan and bench it under the load it was made for"
  "$here/with-server.sh" "$out/server.log" "${llmtool[@]}" serve --plan "$out/plan.toml" -- \
    "${llmtool[@]}" bench --dataset-name lengths --dataset-path "$out/plan.trace.csv" --ignore-eos \
    --output "$out/measured.json" >"$out/bench.txt"
fi
step "4. calibrate the planner by it, and plan again"
planner plan --calibrate "$out/measured.json" --plan "$out/plan.toml" --json -q >"$out/calibrated.json"
planner "${plan[@]}" --output "$out/plan-calibrated.toml" --json -q >"$out/predicted-again.json"

step "Predicted, measured, predicted after calibration (milliseconds, tokens/s)"
python3 - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
before, after = (
    json.loads((out / name).read_text())["plans"][0] for name in ("predicted.json", "predicted-again.json")
)
measured = json.loads((out / "measured.json").read_text())
rows = [
    (name, key)
    for name, key in (
        ("TTFT, mean", "mean_ttft_ms"),
        ("TPOT, mean", "mean_tpot_ms"),
        ("end to end, mean", "mean_e2el_ms"),
        ("output throughput", "output_throughput"),
    )
]
for name, key in rows:
    figures = [source[key] for source in (before, measured, after)]
    errors = [f"{f / figures[1] - 1:+.0%}" if figures[1] else "-" for f in figures]
    print(f"{name:20} {figures[0]:10.1f} ({errors[0]:>6}) {figures[1]:10.1f} {figures[2]:10.1f} ({errors[2]:>6})")
PYTHON
