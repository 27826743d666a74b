"""Perplexity of pruned SmolLM2-135M on held-out text: obs against wanda-sp, flap and paper. Resumable.

Budgets are shares of attention and MLP parameters. Calibration on blocks of 128 tokens of the text of Python's
help; perplexity on other blocks of it, and on tiny_shakespeare ($LLMTOOL_DATA/prompts).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, machine

PATH = RESULTS / "prune_decoder.json"
PARAMS = (0.8, 0.9, 0.7)
METHODS = ("wanda-sp", "flap", "paper", "obs")


def read() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.is_file() else {"cells": {}}


def write(results: dict[str, Any]) -> None:
    results["machine"] = machine()
    scratch = PATH.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    scratch.replace(PATH)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=64, help="of held-out text, 128 tokens each")
    parser.add_argument("--params", type=float, nargs="+", default=PARAMS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from llmtool.prune import data
    from llmtool.prune.baselines import Baseline
    from llmtool.prune.budget import Budget
    from llmtool.prune.cost import CostModel
    from llmtool.prune.encode import encode_blocks
    from llmtool.prune.metrics import perplexity
    from llmtool.prune.model import find, load_model
    from llmtool.prune.objective import Objective
    from llmtool.prune.obs import Obs, Settings
    from llmtool.prune.seed import Paper

    loaded = load_model(find(args.model))
    found = data.default(loaded, args.samples, args.seed)
    path = Path(os.environ.get("LLMTOOL_DATA", "../shared/data")) / "prompts" / "tiny_shakespeare.txt"
    plays = encode_blocks(path.read_text(), loaded.tokenizer, 128)
    texts = {
        "pydoc": list(found.held_out)[: args.blocks],
        "shakespeare": plays[:: max(1, len(plays) // args.blocks)][: args.blocks],
    }
    costs, objective = CostModel(loaded.shape(found.tokens)), Objective("lm", True)

    def scores(model: Any) -> dict[str, float]:
        return {name: perplexity(model, items) for name, items in texts.items()}

    results = read()
    if "dense" not in results["cells"]:
        results["cells"]["dense"] = scores(loaded.model) | {"kv": costs.dense("kv", loaded.sublayers)}
        write(results)
    for method in args.methods:
        missing = [
            p for p in args.params if f"{method} {args.samples} {args.seed} {p:g}" not in read()["cells"]
        ]
        if not missing:
            continue
        start = time.monotonic()
        made: Any
        if method == "obs":
            made = Obs(loaded, found.items, objective, args.seed, Settings(16))
        elif method == "paper":
            made = Paper(loaded, found.items, objective, args.seed)
        else:
            made = Baseline(method, loaded, found.items, args.seed)
        calibration = time.monotonic() - start
        for share in missing:
            start = time.monotonic()
            result = made.prune(Budget({"params": share}), costs)
            seconds = time.monotonic() - start
            used = costs.total("params", loaded.sublayers, result.kept) / costs.dense(
                "params", loaded.sublayers
            )
            cell = scores(result.model) | {
                "used": round(used, 5), "kv": costs.total("kv", loaded.sublayers, result.kept),
                "calibrate_s": round(calibration, 1), "prune_s": round(seconds, 1),
            }  # fmt: skip
            results = read()
            results["cells"][f"{method} {args.samples} {args.seed} {share:g}"] = cell
            write(results)
            sys.stderr.write(f"{method} {share:g}: {cell}\n")


if __name__ == "__main__":
    main()
