"""What a model is asked for: its loss, how far two models' answers are apart, and its score.

Without labels the loss is one whose gradients have the Fisher information's covariance: the negative
log-likelihood of labels drawn from the model's own answer (for logits), or a random projection (for embeddings and
numbers: the Gauss-Newton matrix of squared error). The divergence from the model itself would not do: its gradient
is zero where the model has not changed yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtool.prune.batches import Batch


@dataclass(frozen=True, slots=True)
class Objective:
    """head: classification | regression | qa | lm | embedding. labelled: whether batches bring labels."""

    head: str
    labelled: bool

    def sample_losses(self, outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """A loss per example [B], of labels where there are any (lm: of the text itself)."""
        if self.head == "lm":
            return _next_token_losses(outputs.logits, batch.inputs)
        if self.head == "embedding":
            return _projection(_pooled(outputs, batch), generator)
        if self.head == "qa":
            pairs = zip((outputs.start_logits, outputs.end_logits), range(2), strict=True)
            return sum(
                (
                    F.cross_entropy(
                        logits.float(), self._targets(logits, batch, place, generator), reduction="none"
                    )
                    for logits, place in pairs
                ),
                torch.zeros(len(batch), device=outputs.start_logits.device),
            ) / 2  # fmt: skip
        logits = outputs.logits.float()
        if self.head == "regression":
            if not self.labelled:
                return _projection(logits, generator)
            assert batch.labels is not None
            return (logits.squeeze(-1) - batch.labels.float()) ** 2
        return F.cross_entropy(logits, self._targets(logits, batch, None, generator), reduction="none")

    def _targets(self, logits: Tensor, batch: Batch, place: int | None, generator: torch.Generator) -> Tensor:
        if self.labelled:
            assert batch.labels is not None
            return batch.labels if place is None else batch.labels[:, place]
        probabilities = logits.detach().float().softmax(-1).cpu()
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)

    def answers(self, outputs: Any, batch: Batch) -> Tensor:
        """What two models are compared by: logits [B, C] (lm: [B, S, V]; qa: [B, 2, S]), numbers or embeddings."""
        if self.head == "embedding":
            return _pooled(outputs, batch)
        if self.head == "qa":
            return torch.stack((outputs.start_logits, outputs.end_logits), dim=1)
        answer: Tensor = outputs.logits
        return answer


def divergence(head: str, dense: Tensor, other: Tensor, inputs: Mapping[str, Tensor]) -> float:
    """Sum over examples of how far `other`'s answers are from the dense model's: KL of distributions (lm: mean
    over tokens), squared error of numbers, 1 - cosine of embeddings."""
    dense, other = dense.float(), other.float()
    if head == "embedding":
        return float((1 - F.cosine_similarity(dense, other, dim=-1)).sum())
    if head == "regression":
        return float(((dense - other) ** 2).sum())
    kl = (dense.softmax(-1) * (dense.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
    if head != "lm":
        return float(kl.sum())
    mask = inputs.get("attention_mask")
    weights = torch.ones_like(kl) if mask is None else mask.to(kl.dtype)
    return float(((kl * weights).sum(1) / weights.sum(1)).sum())


def _next_token_losses(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean over a sequence's tokens of their negative log-likelihood."""
    ids = inputs["input_ids"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids.flatten(), reduction="none")
    weights = inputs["attention_mask"][:, 1:].to(losses.dtype)
    return (losses.view_as(ids) * weights).sum(1) / weights.sum(1).clamp(min=1)


def _pooled(outputs: Any, batch: Batch) -> Tensor:
    """The mean of the tokens' hidden states, as sentence encoders pool them; of an image all patches'."""
    hidden: Tensor = outputs.last_hidden_state
    tokens = batch.tokens
    if tokens is None:
        return hidden.mean(1)
    weights = tokens.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def _projection(answers: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(answers.shape, generator=generator).to(answers.device)
    return (answers.float() * direction).sum(-1)
