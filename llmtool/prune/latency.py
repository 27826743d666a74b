"""Seconds, measured on this device: of a layer's parts at several sizes, and of whole models side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llmtool.prune.batches import Batch
from llmtool.prune.cost import LatencyTable
from llmtool.prune.layerwise import layer_inputs
from llmtool.prune.model import Loaded
from llmtool.prune.modeling import Layout, head_dim, layers_of, replace, set_heads

WARM_UP, ROUNDS = 2, 9
WIDTHS = 12  # sizes of an MLP that are measured


def example(loaded: Loaded, batch: int, tokens: int, device: torch.device) -> Batch:
    """Random ids [batch, tokens], none of them padding; or random pixels."""
    config = loaded.model.config
    if loaded.is_image:
        size = int(config.image_size)
        return Batch(
            {"pixel_values": torch.randn(batch, 3, size, size).to(device)}, None, tuple(range(batch))
        )
    ids = torch.randint(0, config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    return Batch(inputs, None, tuple(range(batch)))


@torch.inference_mode()
def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS, warm_up: int = WARM_UP
) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a disturbance hits all of them alike."""
    cuda = torch.cuda.is_available()
    for _ in range(warm_up):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(
    loaded: Loaded, models: Mapping[str, Any], batches: Sequence[int], tokens: int, rounds: int = ROUNDS
) -> dict[int, dict[str, float]]:
    """Batch size -> name -> median seconds of one forward pass over `tokens` tokens each."""
    device = next(loaded.model.parameters()).device
    found = {}
    for size in batches:
        inputs = example(loaded, size, tokens, device).inputs
        found[size] = interleaved({name: _call(model, inputs) for name, model in models.items()}, rounds)
    return found


def grid(units: int, step: int, count: int) -> list[int]:
    """About `count` sizes from nothing to all units, multiples of step, the ends included."""
    wide = max(step, units // count // step * step)
    return sorted({0, *range(wide, units, wide), units})


@torch.inference_mode()
def measure(
    loaded: Loaded,
    batch: int,
    tokens: int,
    granularity: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> LatencyTable:
    """The latency table of this model on its device: one layer with so many heads or neurons, less one without any.

    What is left of the whole model's time (embeddings, norms, the head on top) is its fixed part.
    """
    device = next(loaded.model.parameters()).device
    inputs = example(loaded, batch, tokens, device)
    calls = layer_inputs(loaded.model, loaded.layout, inputs)
    layer, (args, kwargs) = layers_of(loaded.model, loaded.layout)[0], calls.calls[0]
    attention, mlp = loaded.sublayers[0], loaded.sublayers[1]
    sizes = [(n * attention.group, 0) for n in range(1, attention.num_groups + 1)]
    sizes += [(0, n) for n in grid(mlp.num_units, granularity, WIDTHS)[1:]]
    variants = {"empty": _resized(layer, loaded.layout, attention.group, 0, 0)}
    variants |= {f"{h} {w}": _resized(layer, loaded.layout, attention.group, h, w) for h, w in sizes}
    runs: dict[str, Callable[[], Any]] = {
        name: lambda m=module: m(calls.hidden, *args, **kwargs)  # type: ignore[misc]
        for name, module in variants.items()
    }
    runs["model"] = _call(loaded.model, inputs.inputs)
    seconds = interleaved(runs)
    progress(1.0)
    empty = seconds["empty"]
    heads = {0: 0.0} | {h: max(0.0, seconds[f"{h} 0"] - empty) for h, w in sizes if h}
    widths = {0: 0.0} | {w: max(0.0, seconds[f"0 {w}"] - empty) for h, w in sizes if w}
    per_layer = heads[attention.num_units] + widths[mlp.num_units]
    fixed = max(0.0, seconds["model"] - len(calls.calls) * per_layer)
    return LatencyTable(heads, widths, fixed, batch, tokens)


def _call(model: Any, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    options = {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
    return lambda: model(**inputs, **options)


def _resized(layer: nn.Module, layout: Layout, group: int, heads: int, width: int) -> nn.Module:
    """A copy of the layer with random weights and so many heads and neurons."""
    new = copy.deepcopy(layer)
    dim = head_dim(layer, layout)
    shapes: dict[str, tuple[int | None, int | None]] = {
        layout.out: (None, heads * dim),
        layout.down: (None, width),
    }
    shapes |= {name: (width, None) for name in layout.inner}  # noqa: C420
    if heads:
        shapes[layout.query] = heads * dim, None
        shapes[layout.key] = shapes[layout.value] = heads // group * dim, None
    for name, (rows, cols) in shapes.items():
        old: Any = new.get_submodule(name)
        linear = nn.Linear(
            old.in_features if cols is None else cols,
            old.out_features if rows is None else rows,
            bias=old.bias is not None,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        replace(new, name, linear)
    set_heads(new, layout, heads, heads // group)
    return new.eval()
