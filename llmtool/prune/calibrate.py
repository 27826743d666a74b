"""What calibration batches tell: per-sample mask gradients, gradients of outputs, and Gram matrices of inputs.

The seed squares the gradient of a mini-batch's mean loss (arXiv 2204.09656, section 4.1), in which samples cancel
out. Here each sample has a mask of its own, an expanded leaf, so that one backward pass gives every sample's
gradient at the same cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.prune.batches import Batch
from llmtool.prune.masks import masked
from llmtool.prune.modeling import Layout
from llmtool.prune.objective import Objective
from llmtool.prune.units import Sublayer, consumer_of

Progress = Callable[[float], None]


@dataclass(slots=True)
class Gradients:
    """masks: of each sublayer [samples, units], samples in the order of the items. outputs: of each sublayer the
    sum over tokens of g g^T [D, D], g the gradient of its consumer's output. tokens: per batch and sublayer
    ||g||^2 of each token [B, S]."""

    masks: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    tokens: list[list[Tensor]] = field(default_factory=list)
    loss: float = 0.0


def gradients(
    model: nn.Module,
    layout: Layout,
    sublayers: Sequence[Sublayer],
    batches: Sequence[Batch],
    objective: Objective,
    seed: int,
    masks: Sequence[Tensor] | None = None,
    with_outputs: bool = False,
    progress: Progress = lambda fraction: None,
) -> Gradients:
    """Per-sample gradients of the loss by masks, at `masks` (default: all ones).

    model: in evaluation mode; its parameters need no gradients. batches: cover their items once.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(batch) for batch in batches)
    found = Gradients([torch.zeros(count, s.num_units) for s in sublayers])
    if with_outputs:
        sizes = [consumer_of(model, layout, s).out_features for s in sublayers]
        found.outputs = [torch.zeros(n, n, device=device) for n in sizes]
    done = 0
    for batch in batches:
        on_device = batch.to(device)
        leaves = [
            _leaf(s, len(batch), None if masks is None else masks[i], device) for i, s in enumerate(sublayers)
        ]
        watch = _OutputWatch(model, layout, sublayers, found.outputs) if with_outputs else None
        with torch.enable_grad(), masked(model, layout, sublayers, leaves):
            outputs = model(**on_device.inputs, **_no_cache(model))
            losses = objective.sample_losses(outputs, on_device, generator)
            losses.sum().backward()
        found.loss += float(losses.detach().sum())
        for at, leaf in zip(found.masks, leaves, strict=True):
            assert leaf.grad is not None
            at[list(batch.indices)] = leaf.grad.float().cpu()
        if watch is not None:
            found.tokens.append(watch.close())
        done += len(batch)
        progress(done / count)
    found.loss /= max(count, 1)
    return found


def token_weights(batch: Batch, squared: Tensor, share: float) -> Tensor:
    """float32 [B * S]: how much a token's error counts. `share` of it by the token's part of its sample's squared
    output gradients [B, S], the rest evenly; padding counts nothing.

    Within a sample, not among all: a few samples have nearly all of the gradient, and fitting to them generalises
    worse than fitting to all alike.
    """
    tokens = batch.tokens
    even = torch.ones_like(squared) if tokens is None else tokens.float()
    lengths = even.sum(1, keepdim=True)
    parts = squared * even
    total = parts.sum(1, keepdim=True)
    focused = torch.where(total > 0, parts / total.clamp(min=1e-30) * lengths, even)
    return (even * ((1 - share) + share * focused)).flatten()


class _OutputWatch:
    """Takes gradients of the consumers' outputs off a backward pass."""

    def __init__(
        self, model: nn.Module, layout: Layout, sublayers: Sequence[Sublayer], sums: list[Tensor]
    ) -> None:
        self.squares: list[Tensor] = [torch.empty(0)] * len(sublayers)
        self.hooks = [
            consumer_of(model, layout, s).register_forward_hook(self._watcher(i, sums[i]))
            for i, s in enumerate(sublayers)
        ]

    def _watcher(self, index: int, total: Tensor) -> Any:
        def on_gradient(gradient: Tensor) -> None:
            flat = gradient.flatten(0, 1).float()
            total.addmm_(flat.T, flat)
            self.squares[index] = gradient.float().square().sum(-1).cpu()

        def on_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(on_gradient)

        return on_output

    def close(self) -> list[Tensor]:
        for hook in self.hooks:
            hook.remove()
        return self.squares


def _leaf(sublayer: Sublayer, count: int, mask: Tensor | None, device: torch.device) -> Tensor:
    ones = torch.ones(sublayer.num_units) if mask is None else mask
    return ones.to(device).expand(count, -1).clone().requires_grad_()


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
