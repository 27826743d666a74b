"""Task accuracy of dense, paper and obs over budgets, sample counts and seeds. Resumable, cell by cell.

    python benchmarks/prune/accuracy.py --model distilbert-sst2=DIR:sst2 --model minilm-mrpc=DIR:mrpc
    python benchmarks/prune/accuracy.py --summary

Models come from `finetune.py`. A seed chooses the calibration samples; the checkpoint is the same. One calibration
serves all budgets and both methods of a (model, samples, seed). The small model is scored on the whole development
set, in fp32. Cells that are in the result file already are not run again. Seconds are of the processor, of all
threads together, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, machine

PATH = RESULTS / "prune_accuracy.json"
FLOPS = (0.5, 0.4, 0.6, 0.8, 0.7)
METHODS = ("paper", "obs")


def key(name: str, method: str, samples: int, seed: int, flops: float) -> str:
    return f"{name} {method} {samples} {seed} {flops:g}"


@dataclass(frozen=True)
class Grid:
    """Cells of a result file: `NAME dense`, and by `key` those of methods, samples, seeds and budgets."""

    path: Path
    methods: Sequence[str]
    samples: Sequence[int]
    seeds: Sequence[int]
    flops: Sequence[float]

    def run(self, name: str, model: str, task: str) -> None:
        """All cells of a model that are not there yet. Raises LLMToolError for a model or a task that is not to be
        had."""
        import torch

        from llmtool.prune import data
        from llmtool.prune.model import find, load_model

        loaded: Any = None
        for samples in self.samples:
            for seed in self.seeds:
                missing = [
                    (method, flops)
                    for method in self.methods
                    for flops in self.flops
                    if key(name, method, samples, seed, flops) not in self.cells()
                ]
                if not missing:
                    continue
                loaded = loaded or load_model(find(model), "cuda" if torch.cuda.is_available() else "cpu")
                self._run(name, loaded, data.of_task(loaded, task, samples, seed), samples, seed, missing)

    def _run(
        self, name: str, loaded: Any, found: Any, samples: int, seed: int, missing: list[tuple[str, float]]
    ) -> None:
        from llmtool.prune.budget import Budget
        from llmtool.prune.cost import CostModel
        from llmtool.prune.objective import Objective
        from llmtool.prune.obs import Obs, Settings
        from llmtool.prune.pipeline import GRANULARITY
        from llmtool.prune.remove import remove
        from llmtool.prune.seed import Paper

        if f"{name} dense" not in self.cells():
            self._put(f"{name} dense", found.score(loaded.model, loaded.pad_id))
        objective, costs = Objective(loaded.head, found.labelled), CostModel(loaded.shape(found.tokens))
        dense, device = costs.dense("flops", loaded.sublayers), next(loaded.model.parameters()).device.type
        start = time.process_time()
        obs = Obs(loaded, found.items, objective, seed, Settings(GRANULARITY[device]))
        calibration = time.process_time() - start
        made = {"obs": obs, "paper": Paper(loaded, found.items, objective, seed, masks=obs.dense.masks)}
        for method, flops in missing:
            start = time.process_time()
            result = made[method].prune(Budget({"flops": flops}), costs)
            seconds = time.process_time() - start
            small = remove(loaded, result.model, result.kept)
            used = costs.total("flops", loaded.sublayers, result.kept) / dense
            self._put(key(name, method, samples, seed, flops), found.score(small, loaded.pad_id) | {
                "used": round(used, 5), "calibrate_cpu_s": round(calibration, 1),
                "prune_cpu_s": round(seconds, 1), "kept": [len(units) for units in result.kept],
            })  # fmt: skip

    def cells(self) -> dict[str, Any]:
        return dict(json.loads(self.path.read_text())["cells"]) if self.path.is_file() else {}

    def _put(self, name: str, cell: dict[str, Any]) -> None:
        self.path.parent.mkdir(exist_ok=True)
        cells = dict(sorted((self.cells() | {name: cell}).items()))
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"cells": cells, "machine": machine()}, indent=1) + "\n")
        scratch.replace(self.path)
        sys.stderr.write(f"{name}: {cell}\n")

    def summary(self) -> None:
        """Means over seeds, in points lost against dense, as a Markdown table."""
        cells = self.cells()
        groups: dict[tuple[str, str, str], dict[float, list[float]]] = {}
        for name, cell in cells.items():
            if name.endswith(" dense"):
                continue
            *words, method, samples, _, flops = name.split()
            model = " ".join(words)
            metric = next(iter(cells[f"{model} dense"]))
            lost = 100 * (cells[f"{model} dense"][metric] - cell[metric])
            groups.setdefault((model, samples, method), {}).setdefault(float(flops), []).append(lost)
        columns = sorted({f for by_flops in groups.values() for f in by_flops}, reverse=True)
        print("| model | samples | method | " + " | ".join(f"{f:g}" for f in columns) + " |")
        print("|---" * (3 + len(columns)) + "|")
        for (model, samples, method), by_flops in sorted(groups.items()):
            values = [
                f"{statistics.mean(v):+.2f} ({len(v)})" if (v := by_flops.get(f)) else "" for f in columns
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
    grid = Grid(PATH, args.methods, args.samples, args.seeds, args.flops)
    for entry in args.model:
        name, _, rest = entry.partition("=")
        directory, _, task = rest.rpartition(":")
        grid.run(name, directory, task)
    if args.summary:
        grid.summary()


if __name__ == "__main__":
    main()
