"""Taking units out for real: smaller Linears, checked against the masked model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.errors import ModelError
from llmtool.prune.batches import Batch
from llmtool.prune.masks import binary_masks, masked
from llmtool.prune.model import Loaded
from llmtool.prune.modeling import Layout, layers_of, shrink_layer
from llmtool.prune.objective import Objective
from llmtool.prune.units import Kept, Sublayer, columns, kv_heads_of

TOLERANCE = 1e-4  # of the masked and the small model's answers, relative


@torch.no_grad()
def remove(loaded: Loaded, model: Any, kept: Kept) -> Any:
    """`model` (of the dense shapes) without the units that are not kept. The original is left as it is."""
    small = copy.deepcopy(model)
    for layer, (attention, mlp) in zip(
        layers_of(small, loaded.layout), _pairs(loaded.sublayers), strict=True
    ):
        cut_layer(layer, loaded.layout, attention, mlp, kept)
    return small.eval()


@torch.no_grad()
def cut_layer(layer: nn.Module, layout: Layout, attention: Sublayer, mlp: Sublayer, kept: Kept) -> None:
    """A layer of the dense shapes without the units that are not kept, in place."""
    heads, neurons = kept[attention.index], kept[mlp.index]
    kv_heads = kv_heads_of(attention, heads)
    parts = _slices(layer, layout, attention, mlp, heads, kv_heads, neurons)
    shrink_layer(layer, layout, (len(heads), len(kv_heads), len(neurons)))
    for name, (weight, bias) in parts.items():
        module = _find(layer, name)
        if module is None:  # projections of an attention that has no heads
            continue
        module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.contiguous(), requires_grad=False)


def sizes_after(sublayers: Sequence[Sublayer], kept: Kept) -> list[tuple[int, int, int]]:
    """(query heads, KV heads, neurons) of each layer."""
    return [
        (len(kept[a.index]), len(kv_heads_of(a, kept[a.index])), len(kept[m.index]))
        for a, m in _pairs(sublayers)
    ]


@torch.no_grad()
def verify(loaded: Loaded, model: Any, small: Any, kept: Kept, batch: Batch, objective: Objective) -> float:
    """The relative difference of answers between `model` under masks and `small`. Raises ModelError above 1e-4:
    then something else than the masked units was removed."""
    part = batch.to(next(model.parameters()).device)
    masks = binary_masks(loaded.sublayers, kept, next(model.parameters()).device)
    with masked(model, loaded.layout, loaded.sublayers, masks):
        expected = objective.answers(model(**part.inputs), part)
    got = objective.answers(small(**part.inputs), part)
    real = expected.isfinite()
    error = float((got - expected)[real].abs().max() / expected[real].abs().max().clamp(min=1e-6))
    if not error <= TOLERANCE:
        raise ModelError(
            f"The small model's answers differ by {error:.1e} from the masked model's, and may by {TOLERANCE:.0e}.",
            "This is a fault of llmtool or of the family's adapter; nothing was written.",
        )
    return error


def _slices(
    block: nn.Module,
    layout: Layout,
    attention: Sublayer,
    mlp: Sublayer,
    heads: Sequence[int],
    kv_heads: Sequence[int],
    neurons: Sequence[int],
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Linear -> its weight and bias with the kept rows or columns."""
    dim = attention.unit_dim
    rows = columns(attention, heads)
    kv_rows = (torch.tensor(list(kv_heads), dtype=torch.int64)[:, None] * dim + torch.arange(dim)).flatten()
    inner = columns(mlp, neurons)
    parts = {}
    for name, at in ((layout.query, rows), (layout.key, kv_rows), (layout.value, kv_rows)):
        parts[name] = _rows(block.get_submodule(name), at)
    for name in layout.inner:
        parts[name] = _rows(block.get_submodule(name), inner)
    for name, at in ((layout.out, rows), (layout.down, inner)):
        module = block.get_submodule(name)
        parts[name] = (_cut(module.weight, at, 1), _copied(module.bias))  # type: ignore[arg-type]
    return parts


def _rows(module: Any, at: Tensor) -> tuple[Tensor, Tensor | None]:
    return _cut(module.weight, at, 0), None if module.bias is None else _cut(module.bias, at, 0)


def _cut(tensor: Tensor, at: Tensor, dim: int) -> Tensor:
    """The tensor itself where all of it stays: nothing is moved, and results are the same to the bit."""
    if len(at) == tensor.shape[dim]:
        return tensor.detach().clone()
    return tensor.detach().index_select(dim, at.to(tensor.device))


def _copied(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _find(block: nn.Module, name: str) -> Any:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _pairs(sublayers: Sequence[Sublayer]) -> list[tuple[Sublayer, Sublayer]]:
    return list(zip(sublayers[0::2], sublayers[1::2], strict=True))
