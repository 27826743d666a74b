"""The paper's table (arXiv 2204.09656, table 1 and figure 5): BERT-base and DistilBERT on GLUE and SQuAD at 0.6
FLOPs.

Fine-tuned checkpoints come from the hub, so it needs a network, and best a GPU. Resumable: rows that are in the
result file are not run again. `--checkpoint` replaces one, such as `--checkpoint bert squad DIR`.

    python benchmarks/prune/paper_table.py --methods paper obs --flops 0.6 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, machine

PATH = RESULTS / "prune_paper_table.json"
TASKS = ("qqp", "mnli", "qnli", "sst2", "stsb", "mrpc", "squad", "squad_v2")
CHECKPOINTS = {
    ("bert", "qqp"): "textattack/bert-base-uncased-QQP",
    ("bert", "mnli"): "textattack/bert-base-uncased-MNLI",
    ("bert", "qnli"): "textattack/bert-base-uncased-QNLI",
    ("bert", "sst2"): "textattack/bert-base-uncased-SST-2",
    ("bert", "stsb"): "textattack/bert-base-uncased-STS-B",
    ("bert", "mrpc"): "textattack/bert-base-uncased-MRPC",
    ("bert", "squad"): "csarron/bert-base-uncased-squad-v1",
    ("bert", "squad_v2"): "deepset/bert-base-uncased-squad2",
    ("distilbert", "sst2"): "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    ("distilbert", "mrpc"): "textattack/distilbert-base-uncased-MRPC",
    ("distilbert", "qnli"): "textattack/distilbert-base-uncased-QNLI",
    ("distilbert", "qqp"): "textattack/distilbert-base-uncased-QQP",
    ("distilbert", "mnli"): "textattack/distilbert-base-uncased-MNLI",
    ("distilbert", "stsb"): "textattack/distilbert-base-uncased-STS-B",
    ("distilbert", "squad"): "distilbert/distilbert-base-uncased-distilled-squad",
}


def row(directory: str, task: str, method: str, flops: float, samples: int, seed: int) -> dict[str, Any]:
    """One cell of the table: the metric of the dense and of the pruned model, and seconds."""
    import torch

    from llmtool.prune import data
    from llmtool.prune.budget import Budget
    from llmtool.prune.cost import CostModel
    from llmtool.prune.model import find, load_model
    from llmtool.prune.objective import Objective
    from llmtool.prune.obs import Obs, Settings
    from llmtool.prune.seed import Paper

    loaded = load_model(find(directory), "cuda" if torch.cuda.is_available() else "cpu")
    found = data.of_task(loaded, task, samples, seed)
    costs, objective = CostModel(loaded.shape(found.tokens)), Objective(loaded.head, found.labelled)
    start = time.monotonic()
    made: Any = (
        Obs(loaded, found.items, objective, seed, Settings(64 if torch.cuda.is_available() else 16))
        if method == "obs"
        else Paper(loaded, found.items, objective, seed)
    )
    result = made.prune(Budget({"flops": flops}), costs)
    seconds = time.monotonic() - start
    return {
        "dense": found.score(loaded.model, loaded.pad_id),
        "pruned": found.score(result.model, loaded.pad_id),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bodies", nargs="+", default=("bert", "distilbert"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=("paper", "obs"))
    parser.add_argument("--flops", type=float, nargs="+", default=(0.6,))
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument(
        "--checkpoint", nargs=3, action="append", default=[], metavar=("BODY", "TASK", "MODEL")
    )
    args = parser.parse_args()

    from llmtool.errors import LLMToolError

    checkpoints = CHECKPOINTS | {(body, task): model for body, task, model in args.checkpoint}
    cells = json.loads(PATH.read_text())["cells"] if PATH.is_file() else {}
    for body in args.bodies:
        for task in args.tasks:
            if (body, task) not in checkpoints:
                continue
            for method in args.methods:
                for flops in args.flops:
                    for seed in args.seeds:
                        name = f"{body} {task} {method} {flops:g} {args.samples} {seed}"
                        if name in cells:
                            continue
                        try:
                            cells[name] = row(
                                checkpoints[body, task], task, method, flops, args.samples, seed
                            )
                        except LLMToolError as error:
                            sys.stderr.write(f"{name}: {error}\n")
                            continue
                        sys.stderr.write(f"{name}: {cells[name]}\n")
                        PATH.write_text(json.dumps({"cells": cells, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
