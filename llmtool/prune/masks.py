"""Masks on units as forward pre-hooks of the Linear that reads them: no model is patched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.prune.modeling import Layout
from llmtool.prune.units import Kept, Sublayer, consumer_of


@contextmanager
def masked(
    model: nn.Module, layout: Layout, sublayers: Sequence[Sublayer], masks: Sequence[Tensor | None]
) -> Iterator[None]:
    """Within the context each consumer reads its units times masks: [units], or [B, units] per example."""
    hooks = [
        consumer_of(model, layout, s).register_forward_pre_hook(_scaling(mask, s.unit_dim))
        for s, mask in zip(sublayers, masks, strict=True)
        if mask is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def binary_masks(
    sublayers: Sequence[Sublayer], kept: Kept, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """float32 [units] of each sublayer: 1 for kept units."""
    masks = []
    for s, units in zip(sublayers, kept, strict=True):
        mask = torch.zeros(s.num_units, device=device)
        mask[list(units)] = 1.0
        masks.append(mask)
    return masks


def _scaling(mask: Tensor, unit_dim: int) -> Any:
    def scale(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = inputs[0]  # [B, S, units * unit_dim]
        wide = mask.to(x.dtype).repeat_interleave(unit_dim, dim=-1)
        return (x * (wide if mask.dim() == 1 else wide[:, None]), *inputs[1:])

    return scale
