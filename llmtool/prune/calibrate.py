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
    sum over tokens of g g^T [D, D], g the gradient of its consumer's output. grams: the mean over tokens of x x^T
    [in, in], x what the consumer reads."""

    masks: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)
    loss: float = 0.0


def gradients(
    model: nn.Module,
    layout: Layout,
    sublayers: Sequence[Sublayer],
    batches: Sequence[Batch],
    objective: Objective,
    seed: int,
    masks: Sequence[Tensor] | None = None,
    with_moments: bool = False,
    progress: Progress = lambda fraction: None,
) -> Gradients:
    """Per-sample gradients of the loss by masks, at `masks` (default: all ones); with_moments: outputs and grams
    too.

    model: in evaluation mode; its parameters need no gradients. batches: cover their items once.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(batch) for batch in batches)
    found = Gradients([torch.zeros(count, s.num_units) for s in sublayers])
    if with_moments:
        consumers = [consumer_of(model, layout, s) for s in sublayers]
        found.outputs = [torch.zeros(c.out_features, c.out_features, device=device) for c in consumers]
        found.grams = [torch.zeros(c.in_features, c.in_features, device=device) for c in consumers]
    done, tokens = 0, 0
    for batch in batches:
        on_device = batch.to(device)
        leaves = [
            _leaf(s, len(batch), None if masks is None else masks[i], device) for i, s in enumerate(sublayers)
        ]
        watch = _Watch(model, layout, sublayers, found, on_device.tokens) if with_moments else None
        with torch.enable_grad(), masked(model, layout, sublayers, leaves):
            outputs = model(**on_device.inputs, **_no_cache(model))
            losses = objective.sample_losses(outputs, on_device, generator)
            losses.sum().backward()
        found.loss += float(losses.detach().sum())
        for at, leaf in zip(found.masks, leaves, strict=True):
            assert leaf.grad is not None
            at[list(batch.indices)] = leaf.grad.float().cpu()
        if watch is not None:
            tokens += watch.close()
        done += len(batch)
        progress(done / count)
    found.loss /= max(count, 1)
    for gram in found.grams:
        gram /= max(tokens, 1)
    return found


def token_weights(batch: Batch, shape: tuple[int, int]) -> Tensor:
    """float32 [B * S]: 1 for a token, 0 for padding. To weigh tokens by their part of the loss's gradient was no
    better on held-out answers."""
    return torch.ones(shape).flatten() if batch.tokens is None else batch.tokens.float().flatten()


class _Watch:
    """Takes the consumers' inputs off a forward pass, and gradients of their outputs off the backward pass."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        sublayers: Sequence[Sublayer],
        found: Gradients,
        tokens: Tensor | None,
    ) -> None:
        self.tokens, self.count = None if tokens is None else tokens.flatten(), 0
        self.hooks = [
            consumer_of(model, layout, s).register_forward_hook(
                self._watcher(found.outputs[i], found.grams[i])
            )
            for i, s in enumerate(sublayers)
        ]

    def _watcher(self, outputs: Tensor, gram: Tensor) -> Any:
        def on_gradient(gradient: Tensor) -> None:
            flat = gradient.flatten(0, 1).float()
            outputs.addmm_(flat.T, flat)

        def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, 1).float()
            x = x if self.tokens is None else x[self.tokens]
            gram.addmm_(x.T, x)
            self.count = len(x)
            output.register_hook(on_gradient)

        return on_output

    def close(self) -> int:
        """The number of tokens."""
        for hook in self.hooks:
            hook.remove()
        return self.count


def _leaf(sublayer: Sublayer, count: int, mask: Tensor | None, device: torch.device) -> Tensor:
    ones = torch.ones(sublayer.num_units) if mask is None else mask
    return ones.to(device).expand(count, -1).clone().requires_grad_()


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
