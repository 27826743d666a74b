"""A model with some of its layers left out, in the memory of the whole one: what drafts for it cheaply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmtool.errors import UsageError
from llmtool.models.cpu_decoder import CpuDecoder
from llmtool.models.decoder import Decoder, NativeDecoder


def layer_mask(model: Decoder, keep: Sequence[int]) -> Decoder:
    """`model` with layers `keep` only, ascending; it shares all weights (SDFP, arXiv 2602.05499).

    Raises UsageError for layers that the model lacks, none at all, or a model that runs through transformers.
    """
    if not isinstance(model, NativeDecoder | CpuDecoder):
        raise UsageError(
            "This model runs through transformers: no layer of it can be left out.", "Take another proposer."
        )
    count = model.spec.num_layers
    if not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise UsageError(f"Layers to keep must be ascending and between 0 and {count - 1}, not {list(keep)}.")
    spec = replace(model.spec, layers=tuple(model.spec.layers[i] for i in keep))
    weights = replace(
        model.weights,
        layers=[model.weights.layers[i] for i in keep],
        kv_scales={at: model.kv_scales[i] for at, i in enumerate(keep) if i in model.kv_scales},
    )
    if isinstance(model, CpuDecoder):
        return CpuDecoder(spec, weights, model.native, model.max_length)
    return NativeDecoder(spec, weights, model.max_length)


def default_layers(count: int) -> list[int]:
    """The first two fifths and the last tenth of `count` layers: the middle ones change a next token least."""
    first, last = max(1, round(0.4 * count)), max(1, round(0.1 * count))
    return sorted({*range(min(first, count)), *range(max(0, count - last), count)})


def parse_layers(text: str, count: int) -> list[int]:
    """`0-9,28,29` as a list. Raises UsageError."""
    layers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise UsageError(f"{text!r} is no list of layers.", "Write, for example, pruned:0-9,28,29.")
        layers += range(int(low), int(high or low) + 1)
    if not all(0 <= i < count for i in layers):
        raise UsageError(f"The model has {count} layers, 0 to {count - 1}: {text!r} has others.")
    return sorted(set(layers))
