"""Task accuracy of dense, paper and obs over budgets, sample counts and seeds. Resumable, cell by cell.

    python benchmarks/prune/accuracy.py --model distilbert-sst2=DIR:sst2 --model minilm-mrpc=DIR:mrpc
    python benchmarks/prune/accuracy.py --summary

Models come from `finetune.py`. A seed chooses the calibration samples; the checkpoint is the same. One calibration
serves all budgets of a (model, method, samples, seed). Cells that are in the result file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, machine

PATH = RESULTS / "prune_accuracy.json"
FLOPS = (0.5, 0.4, 0.6, 0.8, 0.7)
METHODS = ("paper", "obs")


def read() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.is_file() else {"cells": {}}


def write(results: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    results["machine"] = machine()
    results["cells"] = dict(sorted(results["cells"].items()))
    scratch = PATH.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    scratch.replace(PATH)


def key(name: str, method: str, samples: int, seed: int, flops: float) -> str:
    return f"{name} {method} {samples} {seed} {flops:g}"


def run(name: str, directory: Path, task: str, args: argparse.Namespace) -> None:
    from llmtool.prune import data
    from llmtool.prune.budget import Budget
    from llmtool.prune.cost import CostModel
    from llmtool.prune.model import load_model
    from llmtool.prune.objective import Objective
    from llmtool.prune.obs import Obs, Settings
    from llmtool.prune.seed import Paper

    loaded = load_model(directory)
    for samples in args.samples:
        for seed in args.seeds:
            for method in args.methods:
                results = read()
                missing = [
                    f for f in args.flops if key(name, method, samples, seed, f) not in results["cells"]
                ]
                if not missing:
                    continue
                found = data.of_task(loaded, task, samples, seed)
                dense_key = f"{name} dense"
                if dense_key not in results["cells"]:
                    results["cells"][dense_key] = found.score(loaded.model, loaded.pad_id)
                    write(results)
                objective = Objective(loaded.head, found.labelled)
                costs = CostModel(loaded.shape(found.tokens))
                start = time.monotonic()
                made: Any = (
                    Obs(loaded, found.items, objective, seed, Settings(16))
                    if method == "obs"
                    else Paper(loaded, found.items, objective, seed)
                )
                calibration = time.monotonic() - start
                for flops in missing:
                    start = time.monotonic()
                    result = made.prune(Budget({"flops": flops}), costs)
                    seconds = time.monotonic() - start
                    used = costs.total("flops", loaded.sublayers, result.kept) / costs.dense(
                        "flops", loaded.sublayers
                    )
                    cell = found.score(result.model, loaded.pad_id) | {
                        "used": round(used, 5), "calibrate_s": round(calibration, 1), "prune_s": round(seconds, 1),
                        "kept": [len(units) for units in result.kept],
                    }  # fmt: skip
                    results = read()
                    results["cells"][key(name, method, samples, seed, flops)] = cell
                    write(results)
                    sys.stderr.write(f"{key(name, method, samples, seed, flops)}: {cell}\n")


def summary() -> None:
    """Means over seeds, in points lost against dense, as a Markdown table."""
    cells = read()["cells"]
    groups: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for name, cell in cells.items():
        parts = name.split()
        if parts[1] == "dense":
            continue
        model, method, samples, _, flops = parts
        (metric,) = (k for k in cell if k in ("accuracy", "matthews", "spearman", "f1"))
        lost = 100 * (cells[f"{model} dense"][metric] - cell[metric])
        groups.setdefault((model, samples, method), {}).setdefault(float(flops), []).append(lost)
    print("| model | samples | method | " + " | ".join(f"{f:g}" for f in sorted(FLOPS, reverse=True)) + " |")
    print("|---" * (3 + len(FLOPS)) + "|")
    for (model, samples, method), by_flops in sorted(groups.items()):
        values = [
            f"{statistics.mean(v):+.2f} ({len(v)})" if (v := by_flops.get(f)) else ""
            for f in sorted(FLOPS, reverse=True)
        ]
        print(f"| {model} | {samples} | {method} | " + " | ".join(values) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR:TASK")
    parser.add_argument("--flops", type=float, nargs="+", default=FLOPS)
    parser.add_argument("--samples", type=int, nargs="+", default=(512, 2048))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    for entry in args.model:
        name, _, rest = entry.partition("=")
        directory, _, task = rest.rpartition(":")
        run(name, Path(directory), task, args)
    if args.summary:
        summary()


if __name__ == "__main__":
    main()
