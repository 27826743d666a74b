"""Scores of a model on labelled data: accuracy, Matthews and Spearman correlation, SQuAD's F1 and exact match,
perplexity; and without labels, agreement with the dense model."""

from __future__ import annotations

import collections
import math
import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from llmtool.prune.batches import Item, batches
from llmtool.prune.encode import Window
from llmtool.prune.tasks import Row

MAX_ANSWER_TOKENS = 30
BEST = 20  # starts and ends that are tried with each other


@torch.no_grad()
def answers_of(
    model: nn.Module, items: Sequence[Item], pad_id: int, batch_size: int = 32
) -> list[tuple[Tensor, ...]]:
    """Per item the model's answer: (logits,) or (start logits, end logits), without padding."""
    found: list[tuple[Tensor, ...]] = [()] * len(items)
    device = next(model.parameters()).device
    for batch in batches(items, batch_size, pad_id):
        outputs = model(**batch.to(device).inputs)
        for i, at in enumerate(batch.indices):
            if hasattr(outputs, "start_logits"):
                n = items[at].length
                found[at] = (
                    outputs.start_logits[i, :n].float().cpu(),
                    outputs.end_logits[i, :n].float().cpu(),
                )
            else:
                found[at] = (outputs.logits[i].float().cpu(),)
    return found


def task_score(metric: str, answers: Sequence[tuple[Tensor, ...]], labels: Sequence[Any]) -> float:
    """accuracy, matthews or spearman, in [-1, 1]."""
    logits = torch.stack([a[0] for a in answers])
    if metric == "spearman":
        return float(spearmanr(logits.squeeze(-1).numpy(), [float(label) for label in labels]).statistic)
    predicted, truth = logits.argmax(-1), torch.tensor([int(label) for label in labels])
    if metric == "matthews":
        return matthews(predicted, truth)
    return float((predicted == truth).double().mean())


def matthews(predicted: Tensor, truth: Tensor) -> float:
    """The correlation of two binary labellings; 0 where one of them is constant."""
    p, t = predicted.double(), truth.double()
    spread = math.sqrt(float(p.var(correction=0) * t.var(correction=0)))
    return float(((p * t).mean() - p.mean() * t.mean()) / spread) if spread else 0.0


def squad_scores(
    rows: Sequence[Row], windows: Sequence[Window], answers: Sequence[tuple[Tensor, ...]]
) -> tuple[float, float]:
    """(F1, exact match) in [0, 1]: per row its best span over its windows, against its best answer."""
    best: dict[int, tuple[float, str]] = {}
    for window, (starts, ends) in zip(windows, answers, strict=True):
        score, text = _best_span(rows[window.row].pair or "", window, starts, ends)
        if window.row not in best or score > best[window.row][0]:
            best[window.row] = score, text
    f1 = exact = 0.0
    for i, row in enumerate(rows):
        found = best.get(i, (0.0, ""))[1]
        truths = [text for text, _ in row.answers or ()] or [""]
        f1 += max(_f1(found, truth) for truth in truths)
        exact += max(float(_normal(found) == _normal(truth)) for truth in truths)
    return f1 / len(rows), exact / len(rows)


def _best_span(context: str, window: Window, starts: Tensor, ends: Tensor) -> tuple[float, str]:
    best, text = float(starts[0] + ends[0]) if window.spans[0] is None else -math.inf, ""
    answerable = -math.inf
    for s in starts.topk(min(BEST, len(starts))).indices.tolist():
        for e in ends.topk(min(BEST, len(ends))).indices.tolist():
            first, last = window.spans[s], window.spans[e]
            if first is None or last is None or not s <= e < s + MAX_ANSWER_TOKENS:
                continue
            score = float(starts[s] + ends[e])
            if score > answerable:
                answerable, text = score, context[first[0] : last[1]]
    return (answerable, text) if text else (best, "")


def _normal(text: str) -> str:
    """SQuAD's: lower case, without punctuation, articles and double spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(found: str, truth: str) -> float:
    a, b = _normal(found).split(), _normal(truth).split()
    if not a or not b:
        return float(a == b)
    same = sum((collections.Counter(a) & collections.Counter(b)).values())
    if not same:
        return 0.0
    precision, recall = same / len(a), same / len(b)
    return 2 * precision * recall / (precision + recall)


@torch.no_grad()
def perplexity(model: nn.Module, items: Sequence[Item], batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood of every token but each block's first."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for batch in batches(items, batch_size):
        ids = batch.inputs["input_ids"].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses), count + ids[:, 1:].numel()
    return math.exp(total / count)
