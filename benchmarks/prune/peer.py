"""Against torch-pruning in one run: the same model, data, metric and MACs, no retraining.

torch-pruning (MIT, `pip install torch-pruning`) prunes heads and MLP widths by group importance: magnitude, and its
first-order Taylor importance on the same labelled samples. It gives every layer the same share, so its share of
heads and widths is searched until its MACs are at most the budget.

    python benchmarks/prune/peer.py --model DIR --task sst2 --flops 0.5
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import save


def prune_with_peer(loaded: Any, importance: Any, share: float, example: dict[str, Any]) -> tuple[Any, Any]:
    """A copy pruned to `share` of heads and widths, and the sizes that are left."""
    import torch_pruning as tp

    from llmtool.prune.modeling import layers_of

    model = copy.deepcopy(loaded.model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    heads, ignored, roots = {}, [], []
    layout = loaded.layout
    inside = set()
    for layer in layers_of(model, layout):
        for name in (layout.query, layout.key, layout.value):
            module = layer.get_submodule(name)
            heads[module] = loaded.sublayers[0].num_units
            roots.append(module)
        inside |= {layer.get_submodule(n) for n in (layout.query, layout.key, layout.value, *layout.inner)}
    # The hidden size stays: only what is inside a sublayer may shrink.
    ignored = [
        m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding) and m not in inside
    ]
    pruner = tp.pruner.BasePruner(
        model, example, importance, pruning_ratio=1 - share, num_heads=heads, prune_num_heads=True,
        prune_head_dims=False, head_pruning_ratio=1 - share, ignored_layers=ignored,
        output_transform=lambda out: out.logits.sum(),
    )  # fmt: skip
    return model, pruner


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch_pruning as tp

    from llmtool.prune import data, latency
    from llmtool.prune.batches import batches
    from llmtool.prune.budget import Budget
    from llmtool.prune.cost import CostModel, macs
    from llmtool.prune.model import load_model
    from llmtool.prune.modeling import head_dim, layers_of
    from llmtool.prune.objective import Objective
    from llmtool.prune.obs import Obs, Settings
    from llmtool.prune.seed import Paper

    loaded = load_model(Path(args.model))
    found = data.of_task(loaded, args.task, args.samples, args.seed)
    costs, objective = CostModel(loaded.shape(found.tokens)), Objective(loaded.head, True)
    example = dict(latency.example(loaded, 1, 16, torch.device("cpu")).inputs)
    dense_macs = costs.dense("flops", loaded.sublayers)

    def macs_of(model: Any) -> float:
        total, subs = 0.0, loaded.sublayers
        for layer in layers_of(model, loaded.layout):
            query, down = layer.get_submodule(loaded.layout.query), layer.get_submodule(loaded.layout.down)
            heads = query.out_features // head_dim(layer, loaded.layout)
            total += macs(costs.shape, subs[0], heads, heads) + macs(
                costs.shape, subs[1], down.in_features, 0
            )
        return total

    scores: dict[str, Any] = {"dense": found.score(loaded.model, loaded.pad_id)}
    for name, importance in (
        ("torch-pruning magnitude", tp.importance.GroupMagnitudeImportance()),
        ("torch-pruning taylor", tp.importance.GroupTaylorImportance()),
    ):
        share = 1.0
        while share > 0.02:
            share -= 0.01
            model, pruner = prune_with_peer(loaded, importance, share, example)
            if "taylor" in name:
                for batch in batches(found.items, 32, loaded.pad_id):
                    model(**batch.inputs, labels=batch.labels).loss.backward()
            pruner.step()
            model.eval()
            used = macs_of(model) / dense_macs
            if used <= args.flops:
                break
            share -= max(0.0, (used - args.flops) * 0.8)
        scores[name] = found.score(model, loaded.pad_id) | {"used": round(used, 4)}
        sys.stderr.write(f"{name}: {scores[name]}\n")
    for name, made in (
        ("paper", Paper(loaded, found.items, objective, args.seed)),
        ("obs", Obs(loaded, found.items, objective, args.seed, Settings(16))),
    ):
        result = made.prune(Budget({"flops": args.flops}), costs)  # type: ignore[attr-defined]
        used = costs.total("flops", loaded.sublayers, result.kept) / dense_macs
        scores[name] = found.score(result.model, loaded.pad_id) | {"used": round(used, 4)}
        sys.stderr.write(f"{name}: {scores[name]}\n")
    name = Path(args.model).name
    save(f"prune_peer_{name}", {"model": name, "task": args.task, "flops": args.flops, "samples": args.samples,
                                "torch_pruning": tp.__version__, "scores": scores})  # fmt: skip


if __name__ == "__main__":
    main()
